"""Does a guidance weight chosen per image and step beat a fixed one? Candidates chosen on 100
prompts, confirmed on the evidence set.

    python benchmarks/dynamic.py [--model emoji] [--runs-folder runs/evidence] [--scale 3]

DynamicCFG with the evaluator of latents ("emoji-alignment"), with emoji-clip through the decoder,
with one of fidelity, and with all three, beside CFG at the best fixed scale and beside CFG at the
mean of its own choices. Nobody has rated pictures of this world, so emoji-clip, which prefers whole
pictures to spoilt ones as well, stands for preference. Quality: GenEval's verdict by emoji-judge,
which no evaluator has seen; differences are paired by prompt and seed with a 95% bootstrap
interval. Cost: seconds of processor time against CFG, paired, 16 images a call. Everything is
resumable: finished prompts are read from the folder. The plot shows which weights the evaluator of
latents chose at each step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from results import UNITS, Estimate, Row, images, model_options, on_model, quality, save
from rich.progress import Progress

import diffalign as da
from diffalign.eval.evidence import Config, Measured, compare, evidence_prompts, seed_of
from diffalign.generate.samples import Job, samples
from diffalign.tasks.geneval.verdict import prompts

LATENT, DECODED = "emoji-alignment", "reward:emoji-clip"


class Fidelity:
    """An evaluator of pictures without their prompt: how much of the denoised latents comes back
    when they are decoded and encoded again. What the autoencoder cannot draw does not."""

    sees: Literal["x0", "next"] = "x0"

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __repr__(self) -> str:
        return "fidelity"

    @torch.no_grad()
    def score(self, latents: torch.Tensor, sigma: float, rows: Sequence[int]) -> torch.Tensor:
        images = self.vae.decode(latents, return_dict=False)[0].clamp(-1, 1)
        again = self.vae.encode(images, return_dict=False)[0]
        return -(again - latents).square().flatten(1).mean(1)


def candidates_of(scale: float) -> list[tuple[tuple[float, ...], float]]:
    """The settings to choose from, around the best fixed scale: candidates, and the first progress
    with a choice."""
    less, little, more = (round(scale * f, 2) for f in (2 / 3, 5 / 6, 5 / 3))
    wide = (1.0, less, little, scale, more)
    return [
        (wide, 0.0),
        ((less, little, scale), 0.0),
        ((little, scale, more), 0.0),
        (wide, 0.3),
    ]


COLUMNS = UNITS | {
    "processor time / CFG": "ratio of processor seconds",
    "wall / CFG": "ratio of wall seconds",
    "vs CFG": "difference of score",
    "vs its mean": "difference of score to CFG at the mean of the chosen weights",
    "mean weight": "mean of the chosen weights",
}


def weights(
    pipe: Any, technique: Any, file: Path, *, steps: int, images: int = 96
) -> list[list[float]]:
    """Chosen weights, ``[steps][images]``, on the first seed of evenly spread evidence prompts;
    read from ``file`` when it holds them."""
    settings = {"technique": repr(technique), "steps": steps, "images": images}
    if file.exists() and (saved := json.loads(file.read_text()))["settings"] == settings:
        return [list(map(float, row)) for row in saved["chosen"]]
    ids = evidence_prompts()[:: max(1, len(evidence_prompts()) // images)][:images]
    jobs = [Job(str(prompts()[n]["prompt"]), seed_of(n, 0), str(n)) for n in ids]
    call = {"num_inference_steps": steps, "output_type": "latent"}
    parts = [
        np.array(next(iter(results[0].report.extras.values()))["chosen"])
        for results in samples(pipe, (technique,), jobs, batch=16, call=call)
    ]
    values: list[list[float]] = np.concatenate(parts, axis=1).tolist()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": settings, "chosen": values}) + "\n")
    return values


def cost(
    pipe: Any, plain: Any, other: Any, *, steps: int, batch: int = 16, runs: int = 5
) -> tuple[float, float]:
    """Median of the paired ratios other / plain, decoding of the picture included: processor
    seconds and wall seconds. Order alternates."""
    texts = [str(prompts()[n]["prompt"]) for n in evidence_prompts()[:batch]]

    def once(technique: Any) -> tuple[float, float]:
        began, processor = time.perf_counter(), time.process_time()
        with da.apply(pipe, technique):
            pipe(
                texts,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
        return time.process_time() - processor, time.perf_counter() - began

    once(other)
    ratios: list[tuple[float, float]] = []
    for i in range(runs):
        pair = [once(t) for t in ((plain, other) if i % 2 else (other, plain))]
        a, b = pair if i % 2 else pair[::-1]
        ratios.append((b[0] / a[0], b[1] / a[1]))
    return statistics.median(r[0] for r in ratios), statistics.median(r[1] for r in ratios)


def shares(values: Any) -> dict[str, Any]:
    """Weights ``[steps, images]`` by step: their mean, and the share of images with each."""
    each = {f"{w:g}": (values == w).mean(1).tolist() for w in np.unique(values)}
    return {"images": values.shape[1], "mean": values.mean(1).tolist(), "shares": each}


def main() -> None:
    parser = model_options(__doc__, runs_folder="runs/evidence", threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = on_model(options)
    steps, scale = options.steps, options.scale

    settings = candidates_of(scale)
    evaluators = {
        "alignment": (LATENT,),
        "emoji-clip": (DECODED,),
        "fidelity": (Fidelity(pipe.vae),),
        "all three": (LATENT, DECODED, Fidelity(pipe.vae)),
    }

    def dynamic(setting: tuple[tuple[float, ...], float], kind: str) -> Config:
        values, start = setting
        name = f"Dynamic {kind} {' '.join(f'{w:g}' for w in values)}"
        name += f" from {start:g}" * (start > 0)
        rule = da.DynamicCFG(scale, candidates=values, evaluators=evaluators[kind], start=start)
        return Config(name, (rule,), steps=steps)

    def constant(value: float) -> Config:
        return Config(f"CFG {value:g}", (da.CFG(value),), steps=steps)

    with Progress() as bar:

        def run(config: Config, kind: str) -> Measured:
            return images(bar, pipe, judge, config, options.runs_folder, kind)

        base = run(constant(scale), "tuning")
        tuned = [run(dynamic(setting, "alignment"), "tuning") for setting in settings]
        best = settings[max(range(len(settings)), key=lambda i: compare(tuned[i], base).mean)]
        plain = run(constant(scale), "evidence")
        configs = {kind: dynamic(best, kind) for kind in evaluators}
        ours = {kind: run(config, "evidence") for kind, config in configs.items()}
        folder = Path(options.runs_folder)
        values = {
            kind: np.array(
                weights(pipe, config.techniques[0], folder / f"dynamic-{kind}.json", steps=steps)
            )
            for kind, config in configs.items()
        }
        means = {
            kind: run(constant(round(float(values[kind].mean()), 2)), "evidence")
            for kind in evaluators
        }

    ratios = {
        kind: cost(
            pipe, plain.config.techniques[0], configs[kind].techniques[0], steps=steps, runs=3
        )
        for kind in evaluators
    }
    rows = [row("tuning", m, base) for m in (base, *tuned)]
    rows.append(row("evidence", plain, plain))
    for kind, mine in ours.items():
        rows.append(row("evidence", mine, plain, ratios[kind]))
        rows[-1]["vs its mean"] = Estimate.of(compare(mine, means[kind]))
        rows[-1]["mean weight"] = float(values[kind].mean())
    facts = {
        "plain": plain.config.name,
        "evaluators": {kind: run.config.name for kind, run in ours.items()},
        "candidates": list(best[0]),
        "start": best[1],
        "weights": shares(values["alignment"]),
    }
    save("dynamic", rows, options, COLUMNS, facts)


def row(
    kind: str, run: Measured, reference: Measured, ratio: tuple[float, float] | None = None
) -> Row:
    """A run on one set of prompts, beside CFG on the same."""
    facts = quality(run)
    score = facts.pop("score")
    processor, wall = ratio or (None, None)
    return (
        {"set": kind}
        | facts
        | {"processor time / CFG": processor, "wall / CFG": wall, "score": score}
        | {"vs CFG": Estimate.of(compare(run, reference))}
        | run.tags()
    )


if __name__ == "__main__":
    main()
