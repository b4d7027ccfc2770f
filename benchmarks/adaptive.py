"""Does AdaptiveGuidance save evaluations at equal quality? Threshold chosen on 100 prompts,
confirmed on the evidence set.

    python benchmarks/adaptive.py [--runs-folder runs/evidence] [--scale 1.5]

Beside it stand CFG at the same scale and "CFG for the first p% of the steps" at equal NFE (the
baseline of Step AG, arXiv:2506.08351). Chosen: of the thresholds that save a quarter of the
evaluations, the best on the tuning prompts. Quality: GenEval's verdict by emoji-judge, which no
technique has seen; differences are paired by prompt and seed with a 95% bootstrap interval.
Everything is resumable: finished prompts are read from the folder.
"""

from __future__ import annotations

import torch
from advice import SAVING
from results import UNITS, Estimate, Row, images, model_options, on_model, quality, save
from rich.progress import Progress

import diffalign as da
from diffalign.embedded.load import reward_of
from diffalign.eval.evidence import Config, Measured, compare

CANDIDATES = (
    *(("eps", t) for t in (0.991, 0.998, 0.999)),
    *(("x0", t) for t in (0.95, 0.96, 0.965, 0.97, 0.98, 0.99)),
)
"""(space, threshold); .991 is the published one."""


def main() -> None:
    parser = model_options(__doc__, runs_folder="runs/evidence", threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = on_model(options)
    clip = da.rewards.load(reward_of(options.model))
    steps, scale = options.steps, options.scale

    with Progress() as bar:

        def run(config: Config, kind: str) -> Measured:
            return images(bar, pipe, judge, config, options.runs_folder, kind, clip=clip)

        cfg = Config(f"CFG {scale:g}", (da.CFG(scale),), steps=steps)
        base = run(cfg, "tuning")
        tuned = {}
        for space, t in CANDIDATES:
            rule = da.AdaptiveGuidance(scale, threshold=t, space=space)
            tuned[rule] = run(Config(f"AG {space} {t:g}", (rule,), steps=steps), "tuning")
        choice = best_saver(tuned, base)

        plain = run(cfg, "evidence")
        ours = run(Config(tuned[choice].config.name, (choice,), steps=steps), "evidence")
        share = (round(ours.mean("nfe")) - steps) / steps  # of guided steps that cost the same
        early = da.IntervalCFG(scale, stop=share)
        first = run(Config(f"first {100 * share:g}%", (early,), steps=steps), "evidence")
        off = run(Config("CFG 1", (da.CFG(1.0),), steps=steps), "evidence")

    rows = [row("tuning", base, base)]
    rows += [row("tuning", m, base, rule.space, rule.threshold) for rule, m in tuned.items()]
    rows += [row("evidence", plain, plain)]
    rows += [row("evidence", ours, plain, choice.space, choice.threshold)]
    rows += [row("evidence", m, plain) for m in (first, off)]
    facts = {
        "plain": plain.config.name,
        "ours": ours.config.name,
        "first": first.config.name,
        "threshold": choice.threshold,
        "space": choice.space,
        "ours vs first": Estimate.of(compare(ours, first)),
    }
    save("adaptive", rows, options, UNITS | {"vs CFG": "difference of score"}, facts)


def best_saver(tuned: dict[da.AdaptiveGuidance, Measured], base: Measured) -> da.AdaptiveGuidance:
    """Of the thresholds that save enough, the best on the tuning prompts, the cheaper of equals.

    The evidence set has no say.
    """
    cheap = {
        rule: m for rule, m in tuned.items() if m.mean("nfe") <= (1.0 - SAVING) * base.mean("nfe")
    }
    return max(
        cheap, key=lambda rule: (round(cheap[rule].score().mean, 9), -cheap[rule].mean("nfe"))
    )


def row(
    kind: str,
    run: Measured,
    reference: Measured,
    space: str | None = None,
    threshold: float | None = None,
) -> Row:
    """A run on one set of prompts, beside CFG on the same."""
    facts = quality(run)
    return (
        {"set": kind, "method": facts.pop("method"), "space": space, "threshold": threshold}
        | facts
        | {"vs CFG": Estimate.of(compare(run, reference))}
        | run.tags()
    )


if __name__ == "__main__":
    main()
