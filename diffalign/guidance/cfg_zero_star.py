"""CFG-Zero*: an optimised scale of the unconditional velocity, and still first steps (Fan et al.
2025, arXiv:2503.18886)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, UnsupportedModel
from diffalign.core.checks import check_scale
from diffalign.guidance.base import Guidance
from diffalign.guidance.per_row import column, latent, wide


@dataclass(frozen=True, slots=True)
class ZeroStarState:
    """``batch``: number of images, which a step that evaluates only one of them cannot see."""

    batch: int

    def select(self, rows: Sequence[int]) -> "ZeroStarState":
        """The state of those images."""
        return ZeroStarState(len(rows))


@dataclass(frozen=True, slots=True)
class CFGZeroStar(Guidance[ZeroStarState]):
    """``s u + scale * (c - s u)`` with ``s = <c, u> / |u|^2`` per image, for flow models (Fan et
    al. 2025, arXiv:2503.18886, algorithm 1).

    ``scale``: 1 is off, None the pipeline's own value. ``zero_steps``: first steps at which the
    velocity is 0, so that nothing moves.
    Cost: 2 passes per step. A zero step uses nothing of the prediction; since the pipeline calls
    its model all the same, it evaluates the conditional branch of one image, the least a call can
    be (all images on a compiled model). 1 pass per step at scale 1. Raises ``UnsupportedModel`` on
    models that do not predict a flow velocity, and for zero steps on Qwen-Image.
    """

    scale: float | None = None
    _: KW_ONLY
    zero_steps: int = 1

    def __post_init__(self) -> None:
        check_scale("CFGZeroStar", self.scale)
        if (
            isinstance(self.zero_steps, bool)
            or not isinstance(self.zero_steps, int)
            or self.zero_steps < 0
        ):
            raise ValueError(
                "CFGZeroStar(zero_steps=...) must be an integer of at least 0; got "
                f"{self.zero_steps!r}."
            )

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        if not context.flow:
            raise UnsupportedModel(
                f"CFGZeroStar is defined for flow velocities; {context.pipeline} with "
                f"{context.scheduler} predicts something else. "
                "Use CFG, or RescaledCFG against over-saturation."
            )
        return Guidance.resolve(self, context)

    def init(self, batch: int) -> ZeroStarState:
        return ZeroStarState(batch)

    def passes(self, step: StepInfo, state: ZeroStarState) -> tuple[Pass, ...]:
        if step.index < self.zero_steps:
            return (dataclasses.replace(COND, rows=(0,)),)
        return (COND,) if self.scale == 1.0 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: ZeroStarState
    ) -> tuple[Tensor, ZeroStarState]:
        cond, uncond = preds[COND], preds.get(UNCOND)
        if step.index < self.zero_steps:
            return cond.new_zeros(state.batch, *cond.shape[1:]), state
        if uncond is None:
            return cond, state
        assert self.scale is not None
        c, u = latent(cond, step), latent(uncond, step)
        optimal = (c * u).sum(1) / u.square().sum(1).clamp_min(1e-30)
        return step.mix(wide(cond), column(optimal, uncond) * wide(uncond), self.scale).to(
            cond.dtype
        ), state
