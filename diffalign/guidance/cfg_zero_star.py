"""CFG-Zero*: an optimised scale of the unconditional velocity, and still first steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import (
    CALL,
    COND,
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
from diffalign.guidance.per_image import column, latent, wide


@dataclass(frozen=True, slots=True)
class ZeroStarState:
    """What a step that evaluates one image cannot see."""

    # number of images
    batch: int

    def select(self, rows: Sequence[int]) -> "ZeroStarState":
        """The state of those images."""
        return ZeroStarState(len(rows))


@dataclass(frozen=True, slots=True)
class CFGZeroStar(TwoBranches[ZeroStarState]):
    """Scales the unconditional velocity by ``s`` before it mixes: ``s u + scale * (c - s u)``.

    Fan et al. 2025, arXiv:2503.18886, algorithm 1, for flow models: ``s = <c, u> / |u|^2`` for each
    image. ``zero_steps`` counts the still steps, as diffusers does; the authors' code and its ports
    name the last of them, one less.
    Cost: 2 passes per step. A still step uses nothing of the prediction; since the pipeline calls
    its model all the same, it evaluates the conditional branch of one image, the least a call can
    be (all images on a compiled model). 1 pass per step at scale 1.
    Raises: ``UnsupportedModel`` on models that do not predict a flow velocity, and for still steps
    on Qwen-Image.
    """

    scale: float = auto(CALL, "1 is off", usual=(1.0, 15.0))
    _: KW_ONLY
    zero_steps: int = option(
        1, "first steps at which the velocity is 0, so that nothing moves", low=0, usual=(0, 5)
    )

    def resolve(self, context: Context) -> Self:
        if not context.flow:
            raise UnsupportedModel(
                f"CFGZeroStar is defined for flow velocities; {context.pipeline} with "
                f"{context.scheduler} predicts something else. "
                "Use CFG, or RescaledCFG against over-saturation."
            )
        return filled(self, context)

    def init(self, batch: int) -> ZeroStarState:
        return ZeroStarState(batch)

    def passes(self, step: StepInfo, state: ZeroStarState) -> tuple[Pass, ...]:
        if step.index < self.zero_steps:
            return (dataclasses.replace(COND, rows=(0,)),)
        return TwoBranches.passes(self, step, state)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: ZeroStarState
    ) -> tuple[Tensor, ZeroStarState]:
        if step.index < self.zero_steps:
            cond = preds[COND]
            return cond.new_zeros(state.batch, *cond.shape[1:]), state
        return TwoBranches.combine(self, preds, step, state)

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: ZeroStarState
    ) -> tuple[Tensor, ZeroStarState]:
        c, u = latent(cond, step), latent(uncond, step)
        optimal = (c * u).sum(1) / u.square().sum(1).clamp_min(1e-30)
        scaled = column(optimal, uncond) * wide(uncond)
        return step.mix(wide(cond), scaled, self.scale).to(cond.dtype), state
