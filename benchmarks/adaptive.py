"""Does AdaptiveGuidance save evaluations at equal quality? Threshold chosen on 100 prompts, confirmed on the evidence set.

    python benchmarks/adaptive.py [--runs-folder runs/evidence] [--scale 1.5]

Beside it stand CFG at the same scale and "CFG for the first p% of the steps" at equal NFE (the baseline of Step AG, arXiv:2506.08351).
Quality: GenEval's verdict by emoji-judge, which no technique has seen; differences are paired by prompt and seed with a 95% bootstrap
interval. Everything is resumable: finished prompts are read from the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from results import write
from rich.progress import Progress

import diffalign as da
from diffalign.core.chart import Curve, chart
from diffalign.embedded import load
from diffalign.eval.evidence import Config, Measured, compare, evidence_prompts, measure, tuning_prompts

THRESHOLDS = (0.99, 0.998, 0.999, 0.9995)
TOLERANCE = 0.02  # the lower end of the paired interval must stay above minus this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-folder", default="runs/evidence")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = load("emoji"), load("emoji-judge")
    steps, scale = options.steps, options.scale

    with Progress() as bar:

        def run(config: Config, kind: str) -> Measured:
            ids = tuning_prompts() if kind == "tuning" else evidence_prompts()
            task = bar.add_task(f"{kind}: {config.name}", total=2 * len(ids))
            folder = Path(options.runs_folder) / kind / config.name.replace(" ", "-").replace("%", "")
            done = measure(pipe, judge, config, folder, prompt_ids=ids, progress=lambda n: bar.advance(task, n))
            bar.update(task, completed=2 * len(ids))
            return done

        cfg = Config(f"CFG {scale:g}", (da.CFG(scale),), steps=steps)
        base = run(cfg, "tuning")
        tuned = [run(Config(f"AG {t:g}", (da.AdaptiveGuidance(scale, threshold=t),), steps=steps), "tuning") for t in THRESHOLDS]
        # the cheapest threshold whose score on the tuning prompts is not below CFG's; all measured here, none on the evidence set
        good = [(t, m) for t, m in zip(THRESHOLDS, tuned) if compare(m, base).mean >= 0.0]
        threshold, _ = min(good, key=lambda item: item[1].mean("nfe")) if good else (THRESHOLDS[-1], tuned[-1])

        plain = run(cfg, "evidence")
        ours = run(Config(f"AG {threshold:g}", (da.AdaptiveGuidance(scale, threshold=threshold),), steps=steps), "evidence")
        guided = round(ours.mean("nfe")) - steps  # guided steps that cost the same
        first = run(
            Config(f"CFG first {100 * guided / steps:g}%", (da.IntervalCFG(scale, start=0.0, stop=guided / steps),), steps=steps),
            "evidence",
        )
        off = run(Config("no guidance", (da.CFG(1.0),), steps=steps), "evidence")

    rows: list[dict[str, Any]] = []
    for kind, runs, reference in (("tuning", [base, *tuned], base), ("evidence", [plain, ours, first, off], plain)):
        for m in runs:
            score, against = m.score(), compare(m, reference)
            rows.append(
                {"set": kind, "method": m.config.name, "NFE": m.mean("nfe"), "seconds": m.mean("seconds"), "score": score.mean}
                | {"low": score.low, "high": score.high, "vs CFG": against.mean, "vs low": against.low, "vs high": against.high}
                | m.tags()
            )
    saved = 1.0 - ours.mean("nfe") / plain.mean("nfe")
    holds = saved >= 0.25 and compare(ours, plain).low > -TOLERANCE
    verdict = f"AdaptiveGuidance(threshold={threshold:g}): {100 * saved:.0f}% fewer NFE, difference {compare(ours, plain)}; against the "
    verdict += f"first {100 * guided / steps:g}% at equal NFE {compare(ours, first)}; bar {'held' if holds else 'missed'}"
    write("adaptive", rows, options, title=f"AdaptiveGuidance on emoji, {steps} steps\n\n{verdict}")
    curves = [
        Curve("AdaptiveGuidance, tuning prompts", sorted((m.mean("nfe"), m.score().mean) for m in tuned)),
        *(
            Curve(f"{m.config.name}, evidence", [(m.mean("nfe"), m.score().mean)], low=[m.score().low], high=[m.score().high])
            for m in (plain, ours, first)
        ),
    ]
    chart(curves, title="GenEval verdicts against cost", x_label="NFE per image", y_label="score").save(
        Path(options.output) / "adaptive.png"
    )


if __name__ == "__main__":
    main()
