"""Do negative prompts work without guidance (NAG), and does sparse text attention help (PLADIS)? On the embedded model.

    python benchmarks/attention.py [--runs-folder runs/attention]

Negation: prompts with two objects ("a photo of a dog and a red car"), and the second object's name as the negative prompt. Reported: how
often the negated object is gone while the wanted one stays, by emoji-judge, for nothing, CFG's own negative prompt at several scales, NAG
at CFG 1 and NAG under CFG. PLADIS: verdicts on the evidence set beside a CFG sweep, whose images benchmarks/guidance.py shares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from results import images, write
from rich.progress import Progress

import diffalign as da
from diffalign.embedded import load
from diffalign.eval.bootstrap import interval
from diffalign.eval.evidence import Config, compare, fingerprint, read_lines, seed_of
from diffalign.eval.geneval import keep, prompts


def negation(
    pipe: Any, judge: Any, name: str, techniques: tuple[Any, ...], scale: float, cfg_negative: bool, options: Any, bar: Progress
) -> dict[str, Any]:
    """One row: shares over all two-object prompts x 2 seeds; resumable by prompt."""
    path = Path(options.runs_folder) / fingerprint(pipe.unet) / f"{name}.jsonl".replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {r["prompt_id"]: r for r in read_lines(path)}
    ids = [n for n, item in enumerate(prompts()) if item["tag"] == "two_object"]
    task = bar.add_task(f"negation: {name}", total=len(ids), completed=len(done))
    with path.open("a") as lines:
        for start in range(0, len(left := [n for n in ids if n not in done]), 8):
            batch = left[start : start + 8]
            wanted, negated = ([prompts()[n]["include"][i]["class"] for n in batch] for i in (0, 1))
            tools = tuple(t(negated) if callable(t) else t for t in techniques)
            given: dict[str, Any] = {"negative_prompt": [f"a photo of a {n}" for n in negated]} if cfg_negative else {}
            with da.apply(pipe, *tools) as session:
                images = pipe(
                    [str(prompts()[n]["prompt"]) for n in batch],
                    num_images_per_prompt=2,
                    num_inference_steps=options.steps,
                    guidance_scale=scale,
                    generator=[torch.Generator().manual_seed(seed_of(n, k)) for n in batch for k in range(2)],
                    output_type="pt",
                    **given,
                ).images
            report = session.report()
            scales = [s for s in report.scale if s is not None]
            seen = [keep(found, "two_object", judge.thresholds) for found in judge.detect(images)]
            for i, n in enumerate(batch):
                pair = seen[2 * i : 2 * i + 2]
                record = {
                    "prompt_id": n,
                    "gone": sum(not s.get(negated[i]) for s in pair) / 2,
                    "kept": sum(bool(s.get(wanted[i])) for s in pair) / 2,
                    "both": sum(bool(s.get(wanted[i])) and not s.get(negated[i]) for s in pair) / 2,
                    "nfe": report.nfe,
                    "seconds": report.seconds / (2 * len(batch)),
                    "scale": sum(scales) / len(scales) if scales else 1.0,
                }
                done[n] = record
                lines.write(json.dumps(record) + "\n")
            lines.flush()
            bar.advance(task, len(batch))
    rows = [done[n] for n in ids]
    row: dict[str, Any] = {
        "method": name,
        "NFE": sum(r["nfe"] for r in rows) / len(rows),
        "effective scale": sum(r["scale"] for r in rows) / len(rows),
    }
    for key in ("gone", "kept", "both"):
        value = interval([r[key] for r in rows], ["two"] * len(rows))
        row |= {key: value.mean, f"{key} 95%": f"[{value.low:.3f}, {value.high:.3f}]"}
    return row | {"seconds": sum(r["seconds"] for r in rows) / len(rows)}


def advise(rows: list[dict[str, Any]]) -> None:
    """One sentence for NAG, in the row of its best strength without guidance, from the table's figures alone."""
    nothing = next(row for row in rows if row["method"] == "nothing")
    ours = max((row for row in rows if row["method"].startswith("NAG")), key=lambda row: row["both"])
    theirs = max((row for row in rows if row["method"].endswith("negative")), key=lambda row: row["both"])
    ours["technique"] = "nag"
    ours["advice"] = (
        f"Removes a negated object and keeps the wanted one in {100 * ours['both']:.0f}% at {ours['NFE']:.0f} NFE without guidance "
        f"({ours['method']}; nothing: {100 * nothing['both']:.0f}%); {theirs['method']} prompt: {100 * theirs['both']:.0f}% at "
        f"{theirs['NFE']:.0f} NFE."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-folder", default="runs/attention")
    parser.add_argument("--evidence-folder", default="runs/evidence")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge, clip, scale = load("emoji"), load("emoji-judge"), da.rewards.load("emoji-clip"), options.scale

    def nag(scale: float) -> Any:
        return lambda negated: da.NAG(scale, negative_prompt=tuple(f"a photo of a {n}" for n in negated))

    with Progress() as bar:
        rows = [
            negation(pipe, judge, "nothing", (), 1.0, False, options, bar),
            *(negation(pipe, judge, f"NAG {s:g}", (nag(s),), 1.0, False, options, bar) for s in (2.0, 3.0, 5.0, 9.0)),
            negation(pipe, judge, f"CFG {scale:g}", (da.CFG(scale),), scale, False, options, bar),
            *(negation(pipe, judge, f"CFG {s:g} negative", (da.CFG(s),), s, True, options, bar) for s in (scale, 2.0, 3.0, 5.0)),
            *(negation(pipe, judge, f"CFG {scale:g} NAG {s:g}", (da.CFG(scale), nag(s)), scale, False, options, bar) for s in (3.0, 5.0)),
        ]
        advise(rows)
        write("negation", rows, options, title="Negated object gone, wanted object kept: 99 two-object prompts x 2 seeds on emoji")
        done: dict[tuple[float, float], Any] = {}
        for cfg, strengths in ((1.0, (0.0, 0.5, 1.0, 2.0)), (scale, (0.0, 0.5, 1.0, 2.0)), (2.0, (0.0,)), (3.0, (0.0,))):
            for strength in strengths:
                name = f"CFG {cfg:g}" + (f" PLADIS {strength:g}" if strength else "")
                tools = (da.CFG(cfg), da.PLADIS(strength)) if strength else (da.CFG(cfg),)
                done[cfg, strength] = images(bar, pipe, judge, Config(name, tools, steps=options.steps), options.evidence_folder, clip=clip)
    best = max((m for (_, strength), m in done.items() if not strength), key=lambda m: m.score().mean)
    table = [
        {"method": m.config.name, "NFE": m.mean("nfe"), "seconds": m.mean("seconds"), "score": m.score().mean}
        | {"95%": f"{m.score().low:.3f}-{m.score().high:.3f}", "vs the same CFG": str(compare(m, done[cfg, 0.0]))}
        | {f"vs best of the sweep ({best.config.name})": str(compare(m, best)), "CLIP": m.mean("clip")}
        | m.tags()
        for (cfg, _), m in done.items()
    ]
    for row, ((cfg, strength), m) in zip(table, done.items(), strict=True):
        if (cfg, strength) == (scale, 1.0):
            gain = compare(m, done[cfg, 0.0])
            said = "Use it" if gain.low > 0.0 else "Leave it off" if gain.high < 0.0 else "No difference shown"
            row |= {"technique": "pladis", "advice": f"{said} against the same CFG without it."}
    write("pladis", table, options, title="PLADIS on emoji: 200 GenEval prompts x 2 seeds")


if __name__ == "__main__":
    main()
