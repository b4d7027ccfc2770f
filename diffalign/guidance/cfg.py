"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.core import COND, UNCOND, Pass, StepInfo, Tensor
from diffalign.core.checks import check_scale
from diffalign.guidance.base import Guidance


@dataclass(frozen=True, slots=True)
class CFG(Guidance[None]):
    """``uncond + scale * (cond - uncond)`` at every step, in the pipeline's own arithmetic:
    bit-identical to its native guidance.

    ``scale``: 1 is off (the conditional model), 0 the unconditional model, None the pipeline's own
    value.
    Cost: 2 passes per step; 1 where ``scale`` is 0 or 1.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        check_scale("CFG", self.scale)

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        if self.scale == 1.0:
            return (COND,)
        return (UNCOND,) if self.scale == 0.0 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if len(preds) == 1:
            return next(iter(preds.values())), None
        assert self.scale is not None
        return step.mix(preds[COND], preds[UNCOND], self.scale), None
