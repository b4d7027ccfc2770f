"""Which guidance helps on the embedded model, and what does it cost? Every rule on the evidence set
beside its three baselines.

    python benchmarks/guidance.py [--runs-folder runs/evidence] [--only "CFG*"]

Baselines: CFG at the same scale, the best of a CFG sweep, and plain CFG at equal NFE (fewer or more
steps, within 10%). Verdicts by emoji-judge; differences are paired by prompt and seed with 95%
bootstrap intervals, Holm-corrected over the table. Finished images are never made twice.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import images, write
from rich.progress import Progress

import diffalign as da
from diffalign.core.registry import name_of
from diffalign.drawing.chart import Curve, chart
from diffalign.embedded import load
from diffalign.eval.evidence import Config, Measured, compare

TOLERANCE = 0.02
SWEEP = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5)
STEPS = (10, 15, 25, 30)
STRONG = 3.0
"""A scale at which plain CFG is too strong for this model: where rules against too strong guidance
must show what they repair."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table.

    ``scale``: of the CFG that stands at the same scale; ``technique``: its public name, None for a
    baseline.
    """

    config: Config
    scale: float
    technique: str | None = None


def entries(scale: float, steps: int) -> list[Entry]:
    """The sweep, plain CFG at other costs, CFG for a part of the steps, and every rule at ``scale``
    and most at ``STRONG``."""
    made = [Entry(Config(f"CFG {s:g}", (da.CFG(s),), steps=steps), s) for s in SWEEP]
    made += [
        Entry(Config(f"CFG {scale:g}, {n} steps", (da.CFG(scale),), steps=n), scale) for n in STEPS
    ]
    once: list[tuple[str, Any]] = [
        *((f"first {p}%", da.IntervalCFG(scale, stop=p / 100)) for p in (25, 50, 75)),
        ("AG x0 0.96", da.AdaptiveGuidance(scale, threshold=0.96, space="x0")),
        ("AG eps 0.991", da.AdaptiveGuidance(scale, threshold=0.991, space="eps")),
        ("LinearAG", da.LinearAG()),
        ("dynamic, latent evaluator", da.DynamicCFG(scale, evaluators=("emoji-alignment",))),
        ("CFG++ .6", da.CFGPlusPlus(0.6)),
        ("CFG++ .8", da.CFGPlusPlus(0.8)),
        (
            "beta 10",
            da.BetaCFG(10.0),
        ),  # its scale is a norm; this one guides about as strongly as the others
    ]
    both: list[tuple[str, Callable[[float], Any]]] = [
        ("interval 20-80%", lambda s: da.IntervalCFG(s, start=0.2, stop=0.8)),
        ("linear", lambda s: da.ScheduledCFG(s, shape="linear")),
        ("cosine", lambda s: da.ScheduledCFG(s, shape="cosine")),
        ("inverse linear", lambda s: da.ScheduledCFG(s, shape="inverse-linear")),
        ("S2", lambda s: da.S2Guidance(s)),
        ("skip-layer", lambda s: da.SkipLayerGuidance(s, layers=(LAYER,))),
        ("APG", lambda s: da.APG(s)),
        ("rescaled", lambda s: da.RescaledCFG(s)),
        ("TCFG", lambda s: da.TCFG(s)),
        ("beta density", lambda s: da.BetaCFG(s, gamma=0.0)),
        ("magnitude-aware", lambda s: da.MagnitudeAware(s)),
    ]
    rules = [(name, rule, scale) for name, rule in once] + [
        (f"{name} {s:g}", rule(s), s) for s in (scale, STRONG) for name, rule in both
    ]
    return made + [
        Entry(Config(name, (rule,), steps=steps), s, name_of(rule)) for name, rule, s in rules
    ]


LAYER = 1
"""The one block that skip-layer guidance leaves out: the second of the U-Net's, from its first
third."""


def sentence(row: dict[str, Any]) -> str:
    """What a user of a model like this one can do with it, from the row's figures alone."""
    best, same, saved = row["best"], row["same"], 1.0 - row["NFE"] / row["best_nfe"]
    if best.low > 0.0:
        return f"Use it: {best.mean:+.3f} over the best plain scale."
    if same.low > 0.0:
        beside = f"{best.mean:+.3f} against the best plain scale"
        return f"Use it where the scale may be too strong: {same.mean:+.3f} over plain guidance at the same scale, {beside}."
    if saved >= 0.1 and best.low > -TOLERANCE:
        return f"Use it to save {100 * saved:.0f}% of the evaluations; a loss above {TOLERANCE:g} is excluded at 95%."
    if best.high < 0.0:
        return f"Leave it off: {best.mean:+.3f} against the best plain scale."
    if saved >= 0.1:
        return f"It saves {100 * saved:.0f}%, and may cost up to {-best.low:.3f}: look at your own prompts first."
    return "No difference from the best plain scale was shown" + (
        f"; it costs {-100 * saved:.0f}% more." if saved < -0.1 else "."
    )


def holm(values: dict[str, float]) -> dict[str, float]:
    """Holm 1979: adjusted p values, in any order of names."""
    adjusted, worst = {}, 0.0
    for i, name in enumerate(sorted(values, key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - i) * values[name]))
        adjusted[name] = worst
    return adjusted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-folder", default="runs/evidence")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.5,
        help="guidance scale of every rule: the best of plain CFG",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", default="*", help="pattern of row names: make only these images and write nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = load("emoji"), load("emoji-judge")
    clip = da.rewards.load("emoji-clip")
    chosen = [
        e
        for e in entries(options.scale, options.steps)
        if fnmatch.fnmatch(e.config.name, options.only)
    ]
    runs: dict[str, Measured] = {}
    with Progress() as bar:
        for entry in chosen:
            runs[entry.config.name] = images(
                bar, pipe, judge, entry.config, options.runs_folder, clip=clip
            )
    if options.only != "*":
        return
    best = max((runs[f"CFG {s:g}"] for s in SWEEP), key=lambda m: m.score().mean)
    against = {n: compare(m, best) for n, m in runs.items()}
    adjusted = holm({n: value.p for n, value in against.items() if n != best.config.name})
    plain = [runs[e.config.name] for e in chosen if e.technique is None]
    rows: list[dict[str, Any]] = []
    for entry in chosen:
        m, score = runs[entry.config.name], runs[entry.config.name].score()
        same = compare(m, runs[f"CFG {entry.scale:g}"])
        equal = max(
            (r for r in plain if abs(r.mean("nfe") - m.mean("nfe")) <= 0.1 * m.mean("nfe")),
            key=lambda r: r.score().mean,
            default=best,
        )
        facts = {
            "best": against[m.config.name],
            "same": same,
            "best_nfe": best.mean("nfe"),
            "NFE": m.mean("nfe"),
        }
        rows.append(
            {
                "method": m.config.name,
                "technique": entry.technique,
                "NFE": m.mean("nfe"),
                "seconds": m.mean("seconds"),
            }
            | {
                "score": score.mean,
                "95%": f"{score.low:.3f}-{score.high:.3f}",
                "vs CFG at its scale": str(same),
            }
            | {
                f"vs best ({best.config.name})": str(against[m.config.name]),
                "Holm p": adjusted.get(m.config.name),
            }
            | {
                "vs equal NFE": f"{compare(m, equal)} ({equal.config.name})",
                "CLIP": m.mean("clip"),
                "diversity": m.mean("spread"),
            }
            | {"effective scale": m.mean("scale")}
            | m.tags()
            | {"advice": sentence(facts) if entry.technique else None}
        )
    write(
        "guidance",
        rows,
        options,
        title=f"Guidance on emoji: 200 GenEval prompts x 2 seeds, {len(runs) - 1} comparisons",
    )
    sweep = sorted((m.mean("scale"), m.score().mean) for m in (runs[f"CFG {s:g}"] for s in SWEEP))
    rules = [runs[e.config.name] for e in chosen if e.technique]
    chart(
        [
            Curve("CFG sweep", sweep),
            *(Curve(m.config.name, [(m.mean("scale"), m.score().mean)], line=False) for m in rules),
        ],
        title="Verdicts against effective scale",
        x_label="effective scale",
        names=True,
        size=(1200, 760),
    ).save(Path(options.output) / "guidance-scale.png")
    steps = sorted(
        (m.mean("nfe"), m.score().mean)
        for m in (
            runs[f"CFG {options.scale:g}"],
            *(runs[f"CFG {options.scale:g}, {n} steps"] for n in STEPS),
        )
    )
    chart(
        [
            Curve(f"CFG {options.scale:g}, 10 to 30 steps", steps),
            *(Curve(m.config.name, [(m.mean("nfe"), m.score().mean)], line=False) for m in rules),
        ],
        title="Verdicts against cost",
        x_label="NFE per image",
        names=True,
        size=(1200, 760),
    ).save(Path(options.output) / "guidance-cost.png")


if __name__ == "__main__":
    main()
