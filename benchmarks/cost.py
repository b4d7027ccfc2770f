"""What does each technique cost in time? The embedded model at B = 16, each technique beside plain
CFG (or no guidance), paired.

    python benchmarks/cost.py [--runs 9] [--batch 16]

A round runs every technique once and the plain ones four times, in an order that changes; a ratio
is the median over rounds of a technique against the mean of its plain runs of the same round, per
evaluated row where a technique evaluates fewer. Attention techniques are split in two: interception
(the layers run their own attention, caught and called on), whose share of the ratio is given, and
everything else; NAG and PLADIS act at every step. Processor seconds with one thread, so that other
load does not count.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from results import UNITS, Row, model_options, on_model, save
from rich.progress import track

import diffalign as da
from diffalign.core import AttentionTechnique
from diffalign.tasks.geneval.verdict import prompts


@dataclass(frozen=True, slots=True)
class Caught(AttentionTechnique):
    """Interception alone: every text layer's attention is caught and called as it is."""

    def __call__(
        self, attend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any
    ) -> torch.Tensor:
        result: torch.Tensor = attend(q, k, v)
        return result


CASES: list[tuple[str, str, tuple[Any, ...], float | None]] = [
    # name, plain run that it stands beside, techniques, bar of the ratio
    ("CFG", "plain 2 rows", (da.CFG(),), 1.03),
    ("ScheduledCFG", "plain 2 rows", (da.ScheduledCFG(shape="inverse-linear"),), 1.03),
    ("IntervalCFG", "plain 2 rows", (da.IntervalCFG(start=0.2, stop=0.8),), 1.03),
    ("AdaptiveGuidance", "plain 2 rows", (da.AdaptiveGuidance(),), 1.03),
    ("LinearAG", "plain 2 rows", (da.LinearAG(),), 1.03),
    ("APG", "plain 2 rows", (da.APG(),), 1.03),
    ("RescaledCFG", "plain 2 rows", (da.RescaledCFG(),), 1.03),
    ("TCFG", "plain 2 rows", (da.TCFG(),), 1.03),
    ("BetaCFG", "plain 2 rows", (da.BetaCFG(),), 1.03),
    ("MagnitudeAware", "plain 2 rows", (da.MagnitudeAware(),), 1.03),
    ("CFGPlusPlus", "plain 2 rows", (da.CFGPlusPlus(),), 1.03),
    ("S2Guidance", "plain 2 rows", (da.S2Guidance(),), 1.55),
    ("SkipLayerGuidance", "plain 2 rows", (da.SkipLayerGuidance(layers=(1,)),), 1.55),
    (
        "DynamicCFG, latent evaluator",
        "plain 2 rows",
        (da.DynamicCFG(evaluators=("emoji-alignment",)),),
        1.5,
    ),
    ("interception, no guidance", "plain 1 row", (da.CFG(1.0), Caught()), None),
    (
        "NAG, no guidance",
        "plain 1 row",
        (da.CFG(1.0), da.NAG(negative_prompt="a photo of a dog", sigma=(0.0, math.inf))),
        1.35,
    ),
    (
        "NAG in its default window",
        "plain 1 row",
        (da.CFG(1.0), da.NAG(negative_prompt="a photo of a dog")),
        1.35,
    ),
    ("PLADIS, no guidance", "plain 1 row", (da.CFG(1.0), da.PLADIS()), 1.25),
    ("interception, CFG", "plain 2 rows", (da.CFG(), Caught()), None),
    ("PLADIS, CFG", "plain 2 rows", (da.CFG(), da.PLADIS()), 1.25),
]
COLUMNS = {
    "seconds per image": "processor seconds",
    "NFE": UNITS["NFE"],
    "ratio": "time beside the plain run, median over rounds",
    "bar": "largest ratio allowed",
    "of it interception": "share of the plain run's time",
}
PLAIN_RUNS = 4  # in each round, since every ratio of the round has their mean below the line
PER_ROW = ("ScheduledCFG", "BetaCFG", "IntervalCFG", "AdaptiveGuidance", "LinearAG")
"""Rules that evaluate fewer rows: their time is compared per evaluated row."""


# processor seconds and rows per image of one run
Cost = tuple[float, float]
SCALES = {"plain 2 rows": None, "plain 1 row": 1.0}
"""Guidance scale of the plain runs; None is that of the command line."""


def main() -> None:
    options = model_options(__doc__, runs=9, batch=16).parse_args()
    torch.set_num_threads(1)
    pipe, _ = on_model(options)
    pipe.set_progress_bar_config(disable=True)
    seen = rounds(pipe, options)
    save("cost", table(seen, options.batch), options, COLUMNS)


def once(pipe: Any, techniques: tuple[Any, ...], scale: float, options: Namespace) -> Cost:
    """One run; without techniques no session is open."""
    texts = [str(prompts()[n]["prompt"]) for n in range(0, 553, 553 // options.batch)]
    call = {
        "prompt": texts[: options.batch],
        "num_inference_steps": options.steps,
        "guidance_scale": scale,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if not techniques:
        began = time.process_time()
        pipe(**call)
        return time.process_time() - began, (2.0 if scale > 1 else 1.0) * options.steps
    with da.apply(pipe, *techniques) as session:
        began = time.process_time()
        pipe(**call)
        return time.process_time() - began, session.report().nfe


def rounds(pipe: Any, options: Namespace) -> dict[str, list[Cost]]:
    """Costs of every technique and every plain run, round by round."""
    scales = {name: scale or options.scale for name, scale in SCALES.items()}
    jobs: dict[str, tuple[tuple[Any, ...], float]] = {
        name: ((), scale) for name, scale in scales.items()
    }
    jobs |= {name: (techniques, scales[beside]) for name, beside, techniques, _ in CASES}
    seen: dict[str, list[Cost]] = {name: [] for name in jobs}
    order = [*jobs, *(name for name in scales for _ in range(PLAIN_RUNS - 1))]
    rng = random.Random(0)
    for number in track(range(options.runs + 1), description="rounds"):
        rng.shuffle(order)
        costs: dict[str, list[Cost]] = {name: [] for name in jobs}
        for name in order:
            costs[name].append(once(pipe, *jobs[name], options))
        if number:  # the first warms up
            for name, times in costs.items():
                seen[name].append((statistics.mean(seconds for seconds, _ in times), times[0][1]))
    return seen


def table(seen: dict[str, list[Cost]], batch: int) -> list[Row]:
    """A row for each technique beside its plain run."""
    rows: list[Row] = []
    caught: dict[str, float] = {}
    for name, beside, _, bar in CASES:
        per_row = name in PER_ROW
        ratio = statistics.median(
            (a[0] / (a[1] if per_row else 1.0)) / (b[0] / (b[1] if per_row else 1.0))
            for a, b in zip(seen[name], seen[beside], strict=True)
        )
        if name.startswith("interception"):
            caught[beside] = ratio - 1
        rows.append(
            {
                "technique": name,
                "beside": beside,
                "seconds per image": statistics.median(s for s, _ in seen[name]) / batch,
                "NFE": seen[name][0][1],
                "ratio": ratio,
                "counted": "per evaluated row" if per_row else "whole run",
                "bar": bar,
                "of it interception": caught.get(beside)
                if name.startswith(("NAG", "PLADIS"))
                else None,
            }
        )
    return rows


if __name__ == "__main__":
    main()
