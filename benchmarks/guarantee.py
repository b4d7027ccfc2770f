"""Does a promised threshold keep its promise, and is a searched policy worth its search?

    python benchmarks/guarantee.py [--model emoji] [--images 400] [--loss 0.02] [--splits 100]

The promise: every candidate's images are made once; then, over and over, half of the images at
random calibrate a threshold with ``diffalign.calibration.guarantee``, and its loss is read on the
other half. A promise at 95% may be broken in 5% of the splits. The loss is the share of images that
were right and are not, by the model's judge, or the mean absolute difference of pixels.

The policy: ``calibrate policy`` on other prompts, at 1.5 evaluations a step, beside
AdaptiveGuidance at the same mean cost and beside plain guidance, by the judge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from results import Estimate, Row, model_options, on_model, save
from rich.progress import Progress

from diffalign.calibration.curves import Curves, eight_bits, record
from diffalign.calibration.guarantee import (
    CHOICE,
    SAVINGS,
    Correct,
    _Images,
    losses,
    p_value,
)
from diffalign.calibration.policy import most_trials, search_policy
from diffalign.core import Tensor
from diffalign.eval.evidence import evidence_prompts, tag_of, tuning_prompts
from diffalign.eval.statistics import interval
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.tasks.geneval.verdict import prompts

COLUMNS = {
    "loss": "what is bounded: mean over images",
    "saved": "share of plain guidance's evaluations, mean over the splits that gave a threshold",
    "given": "share of the splits that gave a threshold",
    "broken": "share of all splits whose threshold lost more than promised on the other half",
}
POLICY = {
    "NFE": "denoiser evaluations per image",
    "score": "share of correct images",
    "vs plain": "difference of score",
}
CONFIDENCE = 0.95


def losses_of(
    images: _Images, thresholds: list[float], measure: Correct | None, bar: Progress
) -> Tensor:
    """[thresholds, images] losses; images are made where no earlier threshold made them."""
    task = bar.add_task("candidates", total=len(thresholds))
    rows = []
    for threshold in thresholds:
        rows.append(losses(images.plain, images.at(threshold), images.texts, measure))
        bar.advance(task)
    return torch.stack(rows)


def splits(
    values: Tensor, curves: Curves, thresholds: list[float], bound: float, count: int
) -> Row:
    """How often the chosen threshold breaks the bound on the other half."""
    rng = torch.Generator().manual_seed(0)
    broken, savings = 0, []
    half = values.shape[1] // 2
    for _ in range(count):
        order = torch.randperm(values.shape[1], generator=rng)
        one, rest = order[:half], order[half:]
        choice = None
        for i in range(len(thresholds)):
            if p_value(float(values[i, one].mean()), half, bound) > 1 - CONFIDENCE:
                break
            choice = i
        if choice is not None:
            broken += int(float(values[choice, rest].mean()) > bound)
            cost = curves.nfe(thresholds[choice])[rest].double().mean()
            savings.append(1 - float(cost) / (2 * sum(curves.evaluations)))
    return {
        "bound": bound,
        "images": half,
        "given": len(savings) / count,
        "saved": math.fsum(savings) / max(1, len(savings)),
        "broken": broken / count,
    }


def promise(pipe: Any, judge: Any, options: Any, bar: Progress) -> list[Row]:
    """Rows of the promise."""
    official = [str(entry["prompt"]) for entry in prompts()]
    texts = [official[i * len(official) // options.images] for i in range(options.images)]
    call = {"num_inference_steps": options.steps}
    task = bar.add_task("plain guidance", total=options.steps * -(-len(texts) // 16))
    curves, plain = record(
        pipe, texts, scale=options.scale, space="x0", step=lambda: bar.advance(task), **call
    )
    first = math.ceil(CHOICE * len(texts))
    chooses = Curves(curves.cosine[:first], curves.evaluations, curves.minimum)
    rest = Curves(curves.cosine[first:], curves.evaluations, curves.minimum)
    most = chooses.saving(-1.0)
    thresholds = sorted({chooses.threshold_for(s) for s in SAVINGS if s <= most}, reverse=True)
    rule = AdaptiveGuidance(options.scale, space="x0")
    images = _Images(pipe, rule, rest, jobs_of(texts)[first:], plain[first:], 16, call, None)
    rows = []
    for name, measure in (("pixels", None), ("verdict", Correct(judge))):
        values = losses_of(images, thresholds, measure, bar)
        for bound in (options.loss, 2 * options.loss):
            rows.append({"loss": name} | splits(values, rest, thresholds, bound, options.splits))
    return rows


def policy(pipe: Any, judge: Any, options: Any, bar: Progress) -> list[Row]:
    """Rows of the policy, AdaptiveGuidance and plain guidance on the evidence prompts."""
    steps = options.steps
    nfe = 3 * steps // 2
    trial = [str(prompts()[n]["prompt"]) for n in tuning_prompts()[: options.trial]]
    calls = -(-len(trial) // 32)
    task = bar.add_task("policy", total=(most_trials(steps, nfe) + 1) * steps * calls)
    result = search_policy(
        pipe, trial, scale=options.scale, steps=steps, nfe=nfe, step=lambda: bar.advance(task)
    )
    bar.update(task, completed=bar.tasks[task].total)
    curves, _ = record(pipe, trial, scale=options.scale, space="x0", num_inference_steps=steps)
    adaptive = AdaptiveGuidance(
        options.scale, threshold=curves.threshold_for(1 - nfe / (2 * steps)), space="x0"
    )
    ids = evidence_prompts()
    texts = [str(prompts()[n]["prompt"]) for n in ids]
    ways = {"plain guidance": (), "searched policy": (result.technique,), "adaptive": (adaptive,)}
    right, costs = {}, {}
    for name, techniques in ways.items():
        call = {"num_inference_steps": steps, "guidance_scale": options.scale}
        task = bar.add_task(name, total=len(texts))
        verdicts: list[float] = []
        cost = 0.0
        for group in samples(pipe, techniques, jobs_of(texts), batch=16, call=call):
            images = torch.stack([eight_bits(sample.image).float() / 255 for sample in group])
            verdicts += Correct(judge)(images, [sample.job.prompt for sample in group]).tolist()
            cost += group[0].report.nfe * len(group)
            bar.advance(task, len(group))
        right[name], costs[name] = verdicts, cost / len(texts)
    tags = [tag_of(n) for n in ids]
    plain = right["plain guidance"]
    return [
        {
            "method": name,
            "NFE": costs[name],
            "score": Estimate.of(interval(values, tags)),
            "vs plain": Estimate.of(
                interval([a - b for a, b in zip(values, plain, strict=True)], tags)
            ),
            "shares": list(result.shares) if name == "searched policy" else None,
        }
        for name, values in right.items()
    ]


def main() -> None:
    parser = model_options(__doc__, images=400, loss=0.02, splits=100, trial=16, threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge = on_model(options)
    pipe.set_progress_bar_config(disable=True)
    with Progress() as bar:
        rows = promise(pipe, judge, options, bar)
        save("guarantee", rows, options, COLUMNS)
        save("policy", policy(pipe, judge, options, bar), options, POLICY)


if __name__ == "__main__":
    main()
