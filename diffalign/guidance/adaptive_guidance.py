"""Stop guiding each image once its two predictions agree (Castillo et al.

2023, arXiv:2312.12487).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self

import torch

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, UnsupportedModel
from diffalign.core.checks import check_choice, check_scale, rowwise
from diffalign.core.presets import preset
from diffalign.guidance.base import Guidance


@dataclass(frozen=True, slots=True)
class AdaptiveState:
    """``crossed``: for each image the index of the step at which the cosine reached the threshold,
    None before."""

    crossed: tuple[int | None, ...]

    def select(self, rows: Sequence[int]) -> "AdaptiveState":
        """The state of those images."""
        return AdaptiveState(tuple(self.crossed[row] for row in rows))

    def guided(self, index: int) -> tuple[int, ...]:
        """Images that step ``index`` guides: the crossing step is the last one."""
        return tuple(row for row, at in enumerate(self.crossed) if at is None or index <= at)


def agreement(
    cond: Tensor,
    uncond: Tensor,
    step: StepInfo,
    space: Literal["eps", "x0"],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Cosine of each image's two native predictions, read in ``space``, over all its values: [B,
    ...] twice -> [B] float32.

    ``rows``: which images of the run these are, None for all.
    """
    a, b = (rowwise(step.convert(value, "native", space, rows)) for value in (cond, uncond))
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


@dataclass(frozen=True, slots=True)
class AdaptiveGuidance(Guidance[AdaptiveState]):
    """CFG until the cosine of the two predictions reaches ``threshold``, the conditional model from
    the next step on.

    Castillo et al. 2023, arXiv:2312.12487, section 5: with K guided steps of S an image costs S + K
    evaluations instead of 2S. ``scale``: 1 is off, None the pipeline's own value. ``threshold``:
    cosine that latches, in [-1, 1]; above 1 it is plain CFG, None is looked up for the model
    (``presets.json``, or what ``diffalign calibrate adaptive-guidance`` wrote for yours). A
    threshold belongs to its ``space``: "eps" compares noise predictions (the paper), "x0" denoised
    images; None is looked up together with the threshold, and is "eps" beside a threshold of yours.
    ``min_guided_steps``: no image latches before that many steps (pure noise alone can look like
    agreement). Each image decides for itself, once per step, over all its values in float32; it
    never goes back to guidance.
    Cost: 2 passes for images still guided, 1 for the others; one device synchronisation per guided
    step.
    """

    scale: float | None = None
    _: KW_ONLY
    threshold: float | None = None
    space: Literal["eps", "x0"] | None = None
    min_guided_steps: int = 2

    def __post_init__(self) -> None:
        check_scale("AdaptiveGuidance", self.scale)
        check_scale("AdaptiveGuidance", self.threshold, "threshold")
        if self.space is not None:
            check_choice("AdaptiveGuidance", "space", self.space, ("eps", "x0"))
        if (
            isinstance(self.min_guided_steps, bool)
            or not isinstance(self.min_guided_steps, int)
            or self.min_guided_steps < 1
        ):
            raise ValueError(
                "AdaptiveGuidance(min_guided_steps=...) must be an integer of at least 1; got "
                f"{self.min_guided_steps!r}."
            )

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        made, sources = Guidance.resolve(self, context)
        if self.scale is None and made.scale == 1.0:
            raise UnsupportedModel(
                f"AdaptiveGuidance has nothing to save: {context.pipeline} runs without guidance "
                "here. Give a scale above 1, "
                "or leave it out for models whose guidance is distilled."
            )
        facts = context.facts() | {"scale": made.scale}
        if made.space is None:
            space: Any = "eps"
            source = "the threshold is yours"
            if made.threshold is None:
                space, source = preset("adaptive-guidance", "space", facts)
            made, sources = dataclasses.replace(made, space=space), {**sources, "space": source}
        if made.threshold is None:
            value, source = preset("adaptive-guidance", "threshold", {**facts, "space": made.space})
            made, sources = (
                dataclasses.replace(made, threshold=value),
                {**sources, "threshold": source},
            )
        return made, sources

    def extras(self, state: AdaptiveState) -> dict[str, Any]:
        """``crossed``: for each image the last guided step, None where the threshold was never
        reached."""
        return {"crossed": list(state.crossed)}

    def init(self, batch: int) -> AdaptiveState:
        return AdaptiveState((None,) * batch)

    def passes(self, step: StepInfo, state: AdaptiveState) -> tuple[Pass, ...]:
        guided = state.guided(step.index)
        if self.scale == 1.0 or not guided:
            return (COND,)
        whole = len(guided) == len(state.crossed)
        return (COND, UNCOND if whole else dataclasses.replace(UNCOND, rows=guided))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: AdaptiveState
    ) -> tuple[Tensor, AdaptiveState]:
        cond, uncond, guided = preds[COND], preds.get(UNCOND), list(state.guided(step.index))
        if uncond is None or not guided:
            return cond, state
        assert self.scale is not None
        if len(guided) == len(cond):
            chosen, out = cond, step.mix(cond, uncond, self.scale)
        else:
            chosen = cond[guided]
            mixed = step.mix(chosen, uncond, self.scale)
            out = cond.to(mixed.dtype, copy=True)
            out[guided] = mixed
        if step.evaluation == 0 and step.index + 1 >= self.min_guided_steps:
            state = self._decide(chosen, uncond, guided, step, state)
        return out, state

    @torch.no_grad()
    def _decide(
        self, cond: Tensor, uncond: Tensor, rows: list[int], step: StepInfo, state: AdaptiveState
    ) -> AdaptiveState:
        """Latch the images of ``rows`` whose cosine has reached the threshold."""
        assert self.threshold is not None
        if self.threshold > 1.0:
            return state
        cosine = agreement(cond, uncond, step, self.space or "eps", rows).tolist()
        latched = {row for row, value in zip(rows, cosine) if value >= self.threshold}
        return AdaptiveState(
            tuple(step.index if row in latched else at for row, at in enumerate(state.crossed))
        )
