"""Which guidance helps on the embedded model, and what does it cost? Every rule on the evidence set beside its three baselines.

    python benchmarks/guidance.py [--runs-folder runs/evidence] [--only "CFG*"]

Baselines of architecture: CFG at the same scale, the best of a CFG sweep, CFG at equal NFE (fewer or more steps). Verdicts by emoji-judge;
differences are paired by prompt and seed with 95% bootstrap intervals, Holm-corrected over the table. Finished images are never made twice.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

import torch
from results import write
from rich.progress import Progress

import diffalign as da
from diffalign.core.chart import Curve, chart
from diffalign.embedded import load
from diffalign.eval.evidence import Config, Measured, compare, evidence_prompts, measure

SWEEP = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0)


def configs(scale: float, steps: int, threshold: float | None) -> list[Config]:
    """The sweep, the equal-cost baselines, and one configuration per rule at ``scale``."""
    made = [Config(f"CFG {s:g}", (da.CFG(s),), steps=steps) for s in SWEEP]
    made += [Config(f"CFG {scale:g}, {n} steps", (da.CFG(scale),), steps=n) for n in (3 * steps // 4, 5 * steps // 4, 3 * steps // 2)]
    made += [Config(f"first {p}%", (da.IntervalCFG(scale, stop=p / 100),), steps=steps) for p in (25, 50, 75)]
    rules: dict[str, Any] = {
        "interval 20-80%": da.IntervalCFG(scale, start=0.2, stop=0.8),
        "adaptive": da.AdaptiveGuidance(scale, threshold=threshold),
        "linear": da.ScheduledCFG(scale, shape="linear"),
        "cosine": da.ScheduledCFG(scale, shape="cosine"),
        "inverse linear": da.ScheduledCFG(scale, shape="inverse-linear"),
        "APG": da.APG(scale),
        "rescaled": da.RescaledCFG(scale),
        "TCFG": da.TCFG(scale),
        "beta": da.BetaCFG(scale),
        "magnitude-aware": da.MagnitudeAware(scale),
        "S2": da.S2Guidance(scale),
    }
    return made + [Config(name, (rule,), steps=steps) for name, rule in rules.items()]


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
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of every rule")
    parser.add_argument("--threshold", type=float, help="of AdaptiveGuidance; from benchmarks/adaptive.py, default the preset's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="*", help="pattern of configuration names; CFG at the same scale always runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = load("emoji"), load("emoji-judge")
    clip = da.rewards.load("emoji-clip")
    name = f"CFG {options.scale:g}"
    chosen = [
        c for c in configs(options.scale, options.steps, options.threshold) if c.name == name or fnmatch.fnmatch(c.name, options.only)
    ]
    runs: dict[str, Measured] = {}
    with Progress() as bar:
        for config in chosen:
            task = bar.add_task(config.name, total=2 * len(evidence_prompts()))
            folder = Path(options.runs_folder) / "evidence" / config.name.replace(" ", "-").replace("%", "").replace(",", "")
            runs[config.name] = measure(
                pipe,
                judge,
                config,
                folder,
                prompt_ids=evidence_prompts(),
                scorers={"clip": clip},
                progress=lambda n, t=task: bar.advance(t, n),
            )
            bar.update(task, completed=2 * len(evidence_prompts()))
    base = runs[name]
    best = max((runs[f"CFG {s:g}"] for s in SWEEP if f"CFG {s:g}" in runs), key=lambda m: m.score().mean)
    against = {n: compare(m, base) for n, m in runs.items()}
    adjusted = holm({n: value.p for n, value in against.items() if n != name})
    rows: list[dict[str, Any]] = []
    for n, m in runs.items():
        equal = min((r for k, r in runs.items() if k.startswith("CFG")), key=lambda r, m=m: abs(r.mean("nfe") - m.mean("nfe")))
        rows.append(
            {
                "method": n,
                "NFE": m.mean("nfe"),
                "seconds": m.mean("seconds"),
                "score": m.score().mean,
                "low": m.score().low,
                "high": m.score().high,
            }
            | {f"vs {name}": str(against[n]), "Holm p": adjusted.get(n), f"vs best ({best.config.name})": str(compare(m, best))}
            | {"vs equal NFE": f"{compare(m, equal)} ({equal.config.name})", "CLIP": m.mean("clip"), "diversity": m.mean("spread")}
            | {"effective scale": m.mean("scale")}
            | m.tags()
        )
    write("guidance", rows, options, title=f"Guidance on emoji: 200 GenEval prompts x 2 seeds, {len(runs) - 1} comparisons")
    curves = [Curve("CFG sweep", sorted((r.mean("scale"), r.score().mean) for n, r in runs.items() if n in {f"CFG {s:g}" for s in SWEEP}))]
    others = [n for n in runs if not n.startswith("CFG")]
    curves += [Curve(n, [(runs[n].mean("scale"), runs[n].score().mean)], line=False) for n in others]
    chart(curves, title="Verdicts against effective scale", x_label="effective scale", names=True, size=(1100, 640)).save(
        Path(options.output) / "guidance-scale.png"
    )
    cost = [Curve(n, [(m.mean("nfe"), m.score().mean)], line=False) for n, m in runs.items()]
    chart(cost, title="Verdicts against cost", x_label="NFE per image", names=True, size=(1100, 640)).save(
        Path(options.output) / "guidance-cost.png"
    )


if __name__ == "__main__":
    main()
