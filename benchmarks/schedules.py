"""Is a guidance weight that grows over the steps better than a constant one, and does a shape that
was tuned on one model serve another?

    python benchmarks/schedules.py [--model emoji] [--runs-folder runs/evidence]
    python benchmarks/schedules.py --model emoji-dit --tuned benchmarks/results/schedules.json

Wang et al. 2024 (arXiv:2404.13040) find that growing weights beat constant ones, and that tuned
shapes do not carry over between models. Shapes and mean weights are tried on the 100 tuning
prompts; the best of all, and the best constant, are confirmed on the evidence set. With ``--tuned``
nothing is tuned: the shape that another model's result chose runs at this model's scale. Every
shape has its mean over the steps divided out, so shapes are compared at equal mean weight, but for
the clamped one, whose mean is higher. Verdicts by the model's judge; differences are paired.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from results import UNITS, Estimate, Row, images, model_options, on_model, quality, read, save
from rich.progress import Progress

import diffalign as da
from diffalign.eval.evidence import Config, Measured, compare

SHAPES: dict[str, dict[str, Any]] = {
    "constant": {"shape": "constant"},
    "linear": {"shape": "linear"},
    "linear, clamped": {"shape": "linear"},
    "cosine": {"shape": "cosine"},
    "late (pcs 4)": {"shape": "pcs", "power": 4.0},
    "inverse linear": {"shape": "inverse-linear"},
    "lambda": {"shape": "lambda"},
}
FACTORS = (1.0, 5 / 3)
"""Mean weights to try, in units of the best constant one."""
COLUMNS = UNITS | {
    "mean weight": "of guidance, over the steps",
    "vs constant": "difference of score to the constant weight of the same scale, which is the "
    "mean of all shapes but the clamped one",
    "vs best constant": "difference of score to the constant weight that was best in tuning",
}


def rule(shape: str, scale: float) -> Any:
    """A shape of mean weight ``scale``; the clamped one is at least halfway from 1 to it."""
    clamp = (1.0 + scale) / 2 if "clamped" in shape else None
    return da.ScheduledCFG(scale, **SHAPES[shape], normalise=True, clamp=clamp)


def main() -> None:
    parser = model_options(__doc__, runs_folder="runs/evidence", threads=1)
    parser.add_argument("--tuned", help="result of another model, whose shape is taken")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = on_model(options)
    scales = [round(factor * options.scale, 2) for factor in FACTORS]

    def config(shape: str, scale: float) -> Config:
        if shape == "constant":  # bit for bit plain guidance, whose images other benchmarks share
            return Config(f"CFG {scale:g}", (da.CFG(scale),), steps=options.steps)
        return Config(f"{shape} {scale:g}", (rule(shape, scale),), steps=options.steps)

    rows: list[Row] = []
    with Progress() as bar:

        def run(shape: str, scale: float, kind: str) -> Measured:
            return images(bar, pipe, judge, config(shape, scale), options.runs_folder, kind)

        if options.tuned:
            path = Path(options.tuned)
            best, constant = read(path.stem, path.parent).facts["shape"], scales[0]
            chosen = (best, constant)
        else:
            tuned = {(s, w): run(s, w, "tuning") for w in scales for s in SHAPES}
            scores = {key: m.score().mean for key, m in tuned.items()}
            chosen = max((key for key in tuned if key[0] != "constant"), key=scores.__getitem__)
            constant = max(scales, key=lambda w: scores["constant", w])
            rows += [
                row("tuning", *key, m, tuned["constant", key[1]], tuned["constant", constant])
                for key, m in tuned.items()
            ]
        same = run("constant", chosen[1], "evidence")
        base = run("constant", constant, "evidence")
        for key in dict.fromkeys([("constant", constant), ("constant", chosen[1]), chosen]):
            rows.append(row("evidence", *key, run(*key, "evidence"), same, base))
    facts = {"shape": chosen[0], "scale": chosen[1], "constant": constant}
    save("schedules", rows, options, COLUMNS, facts)


def row(kind: str, shape: str, scale: float, run: Measured, same: Measured, best: Measured) -> Row:
    """A run on one set of prompts, beside the constant weight of the same mean and the best one."""
    facts = quality(run)
    facts.pop("method")
    weights = rule(shape, scale).weights(run.config.steps)
    return (
        {"set": kind, "shape": shape, "scale": scale, "mean weight": fmean(weights)}
        | facts
        | {
            "vs constant": Estimate.of(compare(run, same)),
            "vs best constant": Estimate.of(compare(run, best)),
        }
        | run.tags()
    )


if __name__ == "__main__":
    main()
