"""Which guidance helps on an embedded model, and what does it cost? Every rule on the evidence set
beside its three baselines.

    python benchmarks/guidance.py [--model emoji] [--few] [--runs-folder DIR] [--only "CFG*"]

Baselines: CFG at the same scale, the best of a CFG sweep, and plain CFG at equal NFE (fewer or more
steps, within 10%). Verdicts by the model's judge; differences are paired by prompt and seed with
95% bootstrap intervals, Holm-corrected over the table, and stand once more by the second judge.
Finished images are never made twice.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from results import (
    UNITS,
    Estimate,
    Row,
    images,
    model_options,
    on_model,
    quality,
    save,
    second_judge,
)
from rich.progress import Progress

import diffalign as da
from diffalign.core.registry import name_of
from diffalign.embedded.load import reward_of
from diffalign.eval.evidence import Config, Measured, compare
from diffalign.families import family_of
from diffalign.seams.plan import context_of
from diffalign.seams.support import reason_against

SWEEP = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5)
STEPS = (10, 15, 30)


ADAPTIVE = {"emoji-dit": 0.989}
"""Threshold of AdaptiveGuidance on denoised images, as ``diffalign calibrate adaptive-guidance``
finds it for a saving of 30%; that of ``emoji`` is 0.95."""


def strong(scale: float) -> float:
    """A scale at which plain CFG is too strong for a model whose best is ``scale``: where rules
    against too strong guidance must show what they repair."""
    return next(s for s in SWEEP if s > 1.5 * scale)


COLUMNS = UNITS | {
    "scale": "guidance scale",
    "vs CFG at its scale": "difference of score",
    "vs best": "difference of score",
    "Holm p": 'p value of "vs best", Holm-corrected over the table',
    "second judge vs best": "difference of score by the judge that checks the first",
    "vs equal NFE": "difference of score",
    "diversity": "mean absolute pixel difference between the images of a prompt, in [0, 1]",
    "effective scale": "length of the update, in conditional minus unconditional predictions",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table."""

    config: Config
    # of the CFG that stands at the same scale
    scale: float
    # its public name, None for a baseline
    technique: str | None = None


def entries(scale: float, steps: int, threshold: float = 0.95) -> list[Entry]:
    """The sweep, plain CFG at other costs, CFG for a part of the steps, and every rule at
    ``scale``; those against too strong guidance at ``strong(scale)`` too."""
    plain = [Entry(Config(f"CFG {s:g}", (da.CFG(s),), steps=steps), s) for s in SWEEP]
    plain += [
        Entry(Config(f"CFG {scale:g}, {n} steps", (da.CFG(scale),), steps=n), scale) for n in STEPS
    ]
    once: list[tuple[str, Any]] = [
        *((f"first {p}%", da.IntervalCFG(scale, stop=p / 100)) for p in (25, 50)),
        (f"AG x0 {threshold:g}", da.AdaptiveGuidance(scale, threshold=threshold, space="x0")),
        ("LinearAG", da.LinearAG()),
        ("linear", da.ScheduledCFG(scale, shape="linear")),
        ("cosine", da.ScheduledCFG(scale, shape="cosine")),
        ("inverse linear", da.ScheduledCFG(scale, shape="inverse-linear")),
        ("S2", da.S2Guidance(scale)),
        ("skip-layer", da.SkipLayerGuidance(scale, layers=(LAYER,))),
        ("CFG-Zero*", da.CFGZeroStar(scale)),
        ("CFG-Zero*, no still step", da.CFGZeroStar(scale, zero_steps=0)),
        ("dynamic, latent evaluator", da.DynamicCFG(scale, evaluators=("emoji-alignment",))),
        ("CFG++ .6", da.CFGPlusPlus(0.6)),
        # its scale is a norm; this one guides about as strongly as the others
        ("beta 10", da.BetaCFG(10.0)),
        ("magnitude-aware", da.MagnitudeAware(scale)),
        ("FDG", da.FDG(scale)),
        ("PAG", da.PAG(scale)),
        ("SEG", da.SEG(scale)),
    ]
    both: list[tuple[str, Callable[[float], Any]]] = [
        ("interval 20-80%", lambda s: da.IntervalCFG(s, start=0.2, stop=0.8)),
        ("APG", lambda s: da.APG(s)),
        ("rescaled", lambda s: da.RescaledCFG(s)),
        ("TCFG", lambda s: da.TCFG(s)),
    ]
    rules = [(name, rule, scale) for name, rule in once] + [
        (f"{name} {s:g}", rule(s), s) for s in (scale, strong(scale)) for name, rule in both
    ]
    return plain + [
        Entry(Config(name, (rule,), steps=steps), s, name_of(rule)) for name, rule, s in rules
    ]


def few(scale: float) -> tuple[str, ...]:
    """Patterns of the rows that matter, for a model whose images cost more."""
    strongly = f"{strong(scale):g}"
    plain = [f"CFG {s:g}" for s in (1.0, scale, strong(scale))]
    once = ("CFG*, 15 steps", "first 50%", "AG x0*", "CFG-Zero*")
    repairs = [f"{name} {strongly}" for name in ("interval*", "APG")]
    return (*plain, *once, "S2", "linear", "inverse linear", *repairs)


def acts(pipe: Any, entry: Entry) -> bool:
    """Whether the model can run a rule; one that cannot is named, with the reason."""
    context = context_of(pipe, family_of(type(pipe)))
    reasons = [reason_against(technique, context) for technique in entry.config.techniques]
    for reason in filter(None, reasons):
        print(f"{entry.config.name} is left out: {reason}")
    return not any(reasons)


LAYER = 1
"""The one block that skip-layer guidance leaves out: the second of the U-Net's, from its first
third."""


def holm(values: dict[str, float]) -> dict[str, float]:
    """Holm 1979: adjusted p values, in any order of names."""
    adjusted, worst = {}, 0.0
    for i, name in enumerate(sorted(values, key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - i) * values[name]))
        adjusted[name] = worst
    return adjusted


def main() -> None:
    # the scale of every rule is the best of plain CFG
    parser = model_options(__doc__, runs_folder="runs/evidence", threads=1)
    parser.add_argument(
        "--only", default="*", help="pattern of row names: make only these images and write nothing"
    )
    parser.add_argument("--few", action="store_true", help="the rows that matter alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = on_model(options)
    scorers = {
        "clip": da.rewards.load(reward_of(options.model)),
        "audit": second_judge(options.model),
    }
    patterns = few(options.scale) if options.few else ("*",)
    selection = [
        entry
        for entry in entries(options.scale, options.steps, ADAPTIVE.get(options.model, 0.95))
        if fnmatch.fnmatch(entry.config.name, options.only)
        and any(fnmatch.fnmatch(entry.config.name, pattern) for pattern in patterns)
        and acts(pipe, entry)
    ]
    runs: dict[str, Measured] = {}
    with Progress() as bar:
        for entry in selection:
            runs[entry.config.name] = images(
                bar, pipe, judge, entry.config, options.runs_folder, **scorers
            )
    if options.only != "*":
        return
    sweep = [runs[name] for s in SWEEP if (name := f"CFG {s:g}") in runs]
    best = max(sweep, key=lambda m: m.score().mean)
    rows = compared(selection, runs, best)
    facts = {"best": best.config.name, "comparisons": len(rows) - 1, "prompts": 200, "seeds": 2}
    save("guidance", rows, options, COLUMNS, facts)


def compared(selection: list[Entry], runs: dict[str, Measured], best: Measured) -> list[Row]:
    """Every run beside its three baselines."""
    against = {name: compare(run, best) for name, run in runs.items()}
    adjusted = holm({name: v.p for name, v in against.items() if name != best.config.name})
    plain = [runs[entry.config.name] for entry in selection if entry.technique is None]
    rows: list[Row] = []
    for entry in selection:
        name = entry.config.name
        run, nfe = runs[name], runs[name].mean("nfe")
        equal = max(
            (other for other in plain if abs(other.mean("nfe") - nfe) <= 0.1 * nfe),
            key=lambda other: other.score().mean,
            default=best,
        )
        rows.append(
            {"method": name, "technique": entry.technique, "scale": entry.scale}
            | quality(run)
            | {
                "vs CFG at its scale": Estimate.of(compare(run, runs[f"CFG {entry.scale:g}"])),
                "vs best": Estimate.of(against[name]),
                "Holm p": adjusted.get(name),
                "second judge vs best": Estimate.of(compare(run, best, key="audit")),
                "vs equal NFE": Estimate.of(compare(run, equal)),
                "equal NFE": equal.config.name,
                "CLIP": run.mean("clip"),
                "diversity": run.mean("spread"),
                "effective scale": run.mean("scale"),
            }
            | run.tags()
        )
    return rows


if __name__ == "__main__":
    main()
