"""Does a guidance weight chosen per image and step beat a fixed one? Candidates chosen on 100
prompts, confirmed on the evidence set.

    python benchmarks/dynamic.py [--runs-folder runs/evidence] [--scale 1.5]

DynamicCFG with the latent evaluator ("emoji-alignment") and with emoji-clip through the decoder,
beside CFG at the best fixed scale. Quality: GenEval's verdict by emoji-judge, which neither
evaluator has seen; differences are paired by prompt and seed with a 95% bootstrap interval. Cost:
seconds of processor time against CFG, paired, 16 images a call. Everything is resumable: finished
prompts are read from the folder. The plot shows which weights were chosen at each step.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import UNITS, Estimate, Row, images, model_options, on_model, quality, save
from rich.progress import Progress

import diffalign as da
from diffalign.eval.evidence import Config, Measured, compare, evidence_prompts, seed_of
from diffalign.generate.samples import Job, samples
from diffalign.tasks.geneval.verdict import prompts

WIDE = (1.0, 1.25, 1.5, 2.0, 3.0)
SETTINGS = (
    (WIDE, 0.0),
    ((1.25, 1.5, 2.0), 0.0),
    ((1.5, 2.0, 3.0), 0.0),
    (WIDE, 0.3),
)  # candidates, first progress with a choice
LATENT, DECODED = "emoji-alignment", "reward:emoji-clip"


COLUMNS = UNITS | {
    "processor time / CFG": "ratio of processor seconds",
    "wall / CFG": "ratio of wall seconds",
    "vs CFG": "difference of score",
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
        np.array(results[0].report.extras["unet"]["chosen"])
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

    def dynamic(candidates: tuple[float, ...], start: float, evaluator: str) -> Config:
        name = (
            f"Dynamic {evaluator.removeprefix('reward:')} {' '.join(f'{w:g}' for w in candidates)}"
            + f" from {start:g}" * (start > 0)
        )
        return Config(
            name,
            (da.DynamicCFG(scale, candidates=candidates, evaluators=(evaluator,), start=start),),
            steps=steps,
        )

    with Progress() as bar:

        def run(config: Config, kind: str) -> Measured:
            return images(bar, pipe, judge, config, options.runs_folder, kind)

        cfg = Config(f"CFG {scale:g}", (da.CFG(scale),), steps=steps)
        base = run(cfg, "tuning")
        tuned = [run(dynamic(*setting, LATENT), "tuning") for setting in SETTINGS]
        best = SETTINGS[max(range(len(SETTINGS)), key=lambda i: compare(tuned[i], base).mean)]
        plain = run(cfg, "evidence")
        configs = [dynamic(*best, evaluator) for evaluator in (LATENT, DECODED)]
        ours = [run(config, "evidence") for config in configs]

    latent = configs[0].techniques[0]
    file = Path(options.runs_folder) / "dynamic-weights.json"
    values = np.array(weights(pipe, latent, file, steps=steps))
    ratios = {
        config.name: cost(pipe, cfg.techniques[0], config.techniques[0], steps=steps, runs=runs)
        for config, runs in zip(configs, (9, 3), strict=True)
    }
    rows = [row("tuning", m, base) for m in (base, *tuned)]
    rows += [row("evidence", m, plain, ratios.get(m.config.name)) for m in (plain, *ours)]
    facts = {
        "plain": plain.config.name,
        "latent": ours[0].config.name,
        "decoded": ours[1].config.name,
        "candidates": list(best[0]),
        "start": best[1],
        "latent vs decoded": Estimate.of(compare(*ours)),
        "weights": shares(values),
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
