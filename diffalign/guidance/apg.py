"""Adaptive projected guidance (Sadat, Hilliges and Weber 2024, arXiv:2410.02416, algorithm 1)."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from diffalign.core import CALL, Space, StepInfo, Tensor, TwoBranches, auto, option
from diffalign.guidance.per_image import rowwise


@dataclass(frozen=True, slots=True)
class APGState:
    """The running difference, as the last step left it."""

    # the last step
    index: int = -1
    # the running difference before it and after it, [B, ...] in float32 or None at the start
    past: Tensor | None = None
    latest: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "APGState":
        """The state of those images."""
        past, latest = (
            None if value is None else value[list(rows)] for value in (self.past, self.latest)
        )
        return APGState(self.index, past, latest)


@dataclass(frozen=True, slots=True)
class APG(TwoBranches[APGState]):
    """Weakens the part of CFG's update that is parallel to the conditional denoised image.

    Sadat, Hilliges and Weber 2024, arXiv:2410.02416, algorithm 1: ``m <- (cond - uncond) + momentum
    * m``, capped at norm ``cap`` and split along ``cond``; the result is ``cond + (scale - 1) *
    (orthogonal + eta * parallel)``. High scales then do not over-saturate. With eta 1, no cap and
    no momentum it is CFG up to rounding. Norms are over all values of an image. The momentum is
    remembered before the cap, and a solver's second evaluation of a step starts from the same
    momentum as its first.
    Cost: 2 passes per step and one latent of memory; 1 pass at scale 1.
    """

    combine_space: ClassVar[Space] = "x0"

    scale: float = auto(
        CALL, "1 is off; the paper uses 15 for SDXL and 10 for SD 2.1", usual=(1.0, 20.0)
    )
    _: KW_ONLY
    eta: float = option(0.0, "weight of the parallel part, 1 leaves it as it is", usual=(0.0, 1.0))
    cap: float = auto(
        "apg/cap",
        "largest norm of an image's difference, inf for none",
        low=0.0,
        open_low=True,
        infinite=True,
        usual=(1.0, 20.0),
    )
    momentum: float = auto(
        "apg/momentum",
        "share of the last steps' difference, negative turns against it, 0 is none",
        low=-1.0,
        high=1.0,
    )

    def init(self, batch: int) -> APGState:
        return APGState()

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: APGState
    ) -> tuple[Tensor, APGState]:
        past = state.past if state.index == step.index else state.latest
        moved = cond - uncond
        if past is not None and self.momentum != 0.0:
            moved = moved + self.momentum * past
        latest = moved if step.evaluation == 0 else state.latest
        unit = torch.nn.functional.normalize(rowwise(cond), dim=1)
        difference = rowwise(moved)
        if self.cap < math.inf:
            norm = difference.norm(dim=1, keepdim=True)
            difference = difference * (self.cap / norm.clamp_min(1e-30)).clamp_max(1.0)
        parallel = (difference * unit).sum(1, keepdim=True) * unit
        update = difference - (1.0 - self.eta) * parallel
        guided = cond + (self.scale - 1.0) * update.reshape(cond.shape).to(cond.dtype)
        return guided, APGState(step.index, past, latest)
