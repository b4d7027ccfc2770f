"""Calibrate AdaptiveGuidance's threshold on a model: choose it from the curves of plain CFG, then
look at what it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from diffalign.calibration.curves import Curves, eight_bits, record
from diffalign.core import Tensor
from diffalign.core.types import Pipeline
from diffalign.drawing.charts import Curve, line_chart, stacked
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.guidance.linear_ag import identity_of


@dataclass(frozen=True, slots=True)
class Calibration:
    """A chosen threshold with what it rests on."""

    threshold: float
    curves: Curves
    # [N]: mean absolute difference to plain CFG's image over all pixels, in [0, 1]
    difference: Tensor
    # measured in that second generation, mean over images
    nfe: float
    # the conditions under which the threshold holds, as presets name them
    when: dict[str, object]

    @property
    def nfe_cfg(self) -> int:
        """What plain guidance costs per image."""
        return 2 * sum(self.curves.evaluations)

    def preset(self, source: str) -> dict[str, list[dict[str, object]]]:
        """The content of a preset file; ``source`` says where the value comes from."""
        where = {key: value for key, value in self.when.items() if key != "space"}
        entries = [
            {"option": "space", "value": self.when["space"], "when": where, "source": source},
            {"option": "threshold", "value": self.threshold, "when": self.when, "source": source},
        ]
        return {"adaptive-guidance": entries}

    def table(self) -> list[tuple[float, float, float, int]]:
        """Threshold, NFE per image, share saved, images that latch: for the chosen threshold and
        for savings of 10, 20, 30, 40%."""
        most, curves = self.curves.saving(-1.0), self.curves
        thresholds = {curves.threshold_for(s) for s in (0.1, 0.2, 0.3, 0.4) if s <= most}
        thresholds.add(self.threshold)
        steps = curves.cosine.shape[1]
        return [
            (
                t,
                float(curves.nfe(t).double().mean()),
                curves.saving(t),
                int((curves.latches(t) < steps).sum()),
            )
            for t in sorted(thresholds, reverse=True)
        ]

    def plot(self) -> Image.Image:
        """Above, the cosine per step (median and 10 to 90% of the images) with the threshold;
        below, the cost against the threshold."""
        low, median, high = self.curves.cosine.quantile(
            torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0
        ).tolist()
        last = len(median) - 1
        upper = line_chart(
            [
                Curve(
                    "median cosine, 10 to 90% of the images",
                    list(enumerate(median)),
                    low=low,
                    high=high,
                    band=True,
                ),
                Curve(
                    f"threshold {self.threshold:g}", [(0, self.threshold), (last, self.threshold)]
                ),
            ],
            title=(
                f"Agreement of the branches under plain guidance, {len(self.curves.cosine)} "
                f"images, space {self.when['space']}"
            ),
            x_label="step",
            y_label="cosine",
        )
        most = self.curves.saving(-1.0)
        thresholds = sorted({self.curves.threshold_for(most * i / 24) for i in range(25)})

        def cost(threshold: float) -> tuple[float, float]:
            return threshold, float(self.curves.nfe(threshold).double().mean())

        lower = line_chart(
            [
                Curve("NFE per image", [cost(threshold) for threshold in thresholds]),
                Curve("chosen", [cost(self.threshold)]),
            ],
            title="Cost of each threshold",
            x_label="threshold",
            y_label="NFE per image",
        )
        return stacked([upper, lower])


def check_saving(saving: float, steps: int, order: int = 1, minimum: int = 2) -> None:
    """Raise ValueError unless AdaptiveGuidance can save this share of the evaluations.

    ``order``: evaluations of all steps but the last.
    """
    total = order * steps - (order - 1)
    most = (total - order * minimum) / (2 * total)
    if most <= 0:
        raise ValueError(
            f"AdaptiveGuidance always guides {minimum} steps, so {steps} steps leave nothing to "
            "save; give more steps."
        )
    if not 0.0 < saving <= most:
        raise ValueError(
            f"saving must be above 0 and at most {most:.3f} for {steps} steps, {minimum} of them "
            f"always guided; got {saving:g}."
        )


def calibrate_adaptive_guidance(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int,
    saving: float = 0.25,
    space: Literal["eps", "x0"] = "eps",
    negative_prompt: str = "",
    batch: int = 16,
    seed: int = 0,
    step: Callable[[], None] | None = None,
    **call: object,
) -> Calibration:
    """The highest threshold that saves ``saving`` of plain CFG's evaluations on average over
    ``prompts``, and what it changes.

    ``saving`` in (0, 0.5); ``seed``: base of the seeds; ``step``: called after each step; ``call``:
    further arguments of the pipeline.
    Cost: one generation with plain CFG and one with the chosen threshold for every prompt. Raises
    ValueError when the saving cannot be reached, and whatever ``apply`` raises for the pipeline.
    """
    rule = AdaptiveGuidance(scale, space=space)
    check_saving(saving, steps, int(getattr(pipe.scheduler, "order", 1)), rule.min_guided_steps)
    call |= {"num_inference_steps": steps}
    call |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    curves, plain = record(
        pipe,
        prompts,
        scale=scale,
        space=space,
        minimum=rule.min_guided_steps,
        batch=batch,
        seed=seed,
        step=step,
        **call,
    )
    threshold = curves.threshold_for(saving)
    differences: list[Tensor] = []
    nfe = 0.0
    techniques = (dataclasses.replace(rule, threshold=threshold),)
    for results in samples(
        pipe, techniques, jobs_of(prompts, base=seed), batch=batch, call=call, step=step
    ):
        for sample in results:
            reference = plain[len(differences)].double()
            change = (eight_bits(sample.image).double() - reference).abs().mean() / 255.0
            differences.append(change)
        nfe += results[0].report.nfe * len(results)
    when = conditions(pipe, scale, steps, space, negative_prompt)
    return Calibration(threshold, curves, torch.stack(differences), nfe / len(prompts), when)


def conditions(
    pipe: Pipeline, scale: float, steps: int, space: str, negative_prompt: str
) -> dict[str, object]:
    """The conditions under which a threshold holds, as presets name them."""
    identity = identity_of(pipe, steps, scale, (), negative_prompt)
    return {
        "model": identity.model,
        "scheduler": identity.scheduler,
        "steps": steps,
        "scale": float(scale),
        "space": space,
    }
