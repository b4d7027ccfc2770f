"""Tangential damping of the unconditional prediction (Kwon et al. 2025, arXiv:2503.18137)."""

from dataclasses import dataclass

import torch

from diffalign.core import StepInfo, Tensor
from diffalign.core.checks import check_scale
from diffalign.guidance.per_row import BothBranches, column, latent, wide


@dataclass(frozen=True, slots=True)
class TCFG(BothBranches):
    """CFG after the unconditional prediction is projected on the direction both predictions share
    most (arXiv:2503.18137).

    That direction is the first right singular vector of the 2 x n matrix of the two predictions of
    an image. With the Gram matrix ``[[a, b], [b, d]]`` and ``D = hypot(a - d, 2 b)`` the projection
    is ``b / D * cond + (1 - (a - d) / D) / 2 * uncond``: two inner products instead of a singular
    value decomposition. ``scale``: 1 is off, None the pipeline's own value (the paper: 7.5 for SD
    1.5, 5 for SDXL, 7 for SD3). Where the predictions are orthogonal and equally long no direction
    is first, and the conditional one is taken.
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        check_scale("TCFG", self.scale)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, step: StepInfo) -> Tensor:
        c, u = latent(cond, step), latent(uncond, step)
        a, b, d = c.square().sum(1), (c * u).sum(1), u.square().sum(1)
        spread = torch.hypot(a - d, 2.0 * b)
        safe = spread.clamp_min(1e-30)
        of_cond = b / safe
        of_uncond = torch.where(spread > 0.0, 0.5 * (1.0 - (a - d) / safe), torch.zeros_like(a))
        tangential = column(of_cond, cond) * wide(cond) + column(of_uncond, uncond) * wide(uncond)
        return step.mix(wide(cond), tangential, scale).to(cond.dtype)
