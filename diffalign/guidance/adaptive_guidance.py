"""Stop guiding each image once its two predictions agree."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Self

import torch

from diffalign.core import (
    CALL,
    COND,
    UNCOND,
    Context,
    Pass,
    StepInfo,
    Tensor,
    TwoBranches,
    UnsupportedModel,
    auto,
    filled,
    option,
)
from diffalign.core.types import Json
from diffalign.guidance.cfg import CFG
from diffalign.guidance.per_image import rowwise


@dataclass(frozen=True, slots=True)
class AdaptiveState:
    """When each image latched."""

    # the step at which the image's cosine reached the threshold, None before
    crossed: tuple[int | None, ...]

    def select(self, rows: Sequence[int]) -> "AdaptiveState":
        """The state of those images."""
        return AdaptiveState(tuple(self.crossed[row] for row in rows))

    def guided(self, index: int) -> tuple[int, ...]:
        """Images that step ``index`` guides: the crossing step is the last one."""
        return tuple(row for row, at in enumerate(self.crossed) if at is None or index <= at)

    def latched(self, rows: Sequence[int], index: int) -> "AdaptiveState":
        """The state after those images have crossed at step ``index``."""
        return AdaptiveState(
            tuple(index if row in rows else at for row, at in enumerate(self.crossed))
        )


@torch.no_grad()
def agreement(
    cond: Tensor,
    uncond: Tensor,
    step: StepInfo,
    space: Literal["eps", "x0"],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Cosine of each image's two native predictions, read in ``space``, over all its values: [B,
    ...] twice -> [B].

    Summed in float64, in float32 on devices without it. ``rows``: which images of the run these
    are, None for all.
    """
    a, b = (rowwise(step.convert(value, "native", space, rows)) for value in (cond, uncond))
    if a.device.type != "mps":
        a, b = a.double(), b.double()
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


@dataclass(frozen=True, slots=True)
class AdaptiveGuidance(TwoBranches[AdaptiveState]):
    """Guides each image until its two predictions agree; the conditional model runs from there on.

    Castillo et al. 2023, arXiv:2312.12487, section 5: with K guided steps of S an image costs S + K
    evaluations instead of 2S. Two predictions agree when their cosine reaches ``threshold``, over
    all values of the image. Each image decides for itself, once per step, and never goes
    back to guidance. ``diffalign calibrate adaptive-guidance`` measures your model's threshold.
    A negative prompt acts while an image is guided and no longer: on the embedded model negated
    objects stay away as under plain guidance, negated colours come back.
    Cost: 2 passes for images still guided, 1 for the others; one device synchronisation per guided
    step.
    Raises: ``UnsupportedModel`` where the pipeline does not guide and no scale is given.
    """

    scale: float = auto(CALL, "1 is off", usual=(1.0, 15.0))
    _: KW_ONLY
    space: Literal["eps", "x0"] = auto(
        "adaptive-guidance/space",
        "what is compared: noise predictions (eps, as in the paper) or denoised images (x0); eps "
        "beside a threshold of yours, which belongs to its space",
    )
    threshold: float = auto(
        "adaptive-guidance/threshold",
        "cosine that ends guidance; above 1 is plain CFG",
        usual=(0.9, 1.0),
    )
    min_guided_steps: int = option(
        2, "steps before which no image latches: in pure noise alone predictions may agree", low=1
    )

    @property
    def cosine_space(self) -> Literal["eps", "x0"]:
        return self.space or "eps"

    def resolve(self, context: Context) -> Self:
        technique = self
        if self.space is None and self.threshold is not None:
            technique = dataclasses.replace(self, space="eps")
            context.sources["space"] = "the threshold is yours"
        technique = filled(technique, context)
        if self.scale is None and technique.scale == 1.0:
            raise UnsupportedModel(
                f"AdaptiveGuidance has nothing to save: {context.pipeline} runs without guidance "
                "here. Give a scale above 1, "
                "or leave it out for models whose guidance is distilled."
            )
        return technique

    def extras(self, state: AdaptiveState) -> Json:
        """``crossed``: for each image the last guided step, None where the threshold was never
        reached."""
        return {"crossed": list(state.crossed)}

    def init(self, batch: int) -> AdaptiveState:
        return AdaptiveState((None,) * batch)

    def passes(self, step: StepInfo, state: AdaptiveState) -> tuple[Pass, ...]:
        rows = state.guided(step.index)
        if self.scale == 1.0 or not rows:
            return (COND,)
        whole = len(rows) == len(state.crossed)
        return (COND, UNCOND if whole else dataclasses.replace(UNCOND, rows=rows))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: AdaptiveState
    ) -> tuple[Tensor, AdaptiveState]:
        cond, uncond, rows = preds[COND], preds.get(UNCOND), list(state.guided(step.index))
        if uncond is None or not rows:
            return cond, state
        whole = len(rows) == len(cond)
        part = cond if whole else cond[rows]
        guided, _ = CFG(self.scale).guide(part, uncond, step, None)
        if step.evaluation == 0 and step.index + 1 >= self.min_guided_steps and self.threshold <= 1:
            cosines = agreement(part, uncond, step, self.cosine_space, rows).tolist()
            agreeing = [row for row, cosine in zip(rows, cosines) if cosine >= self.threshold]
            state = state.latched(agreeing, step.index)
        if whole:
            return guided, state
        everyone = cond.to(guided.dtype, copy=True)
        everyone[rows] = guided
        return everyone, state
