"""Tangential damping of the unconditional prediction."""

from dataclasses import dataclass

import torch

from diffalign.core import CALL, StepInfo, Tensor, TwoBranches, auto
from diffalign.guidance.per_image import column, latent, wide


@dataclass(frozen=True, slots=True)
class TCFG(TwoBranches[None]):
    """Projects the unconditional prediction on the direction both share most, then guides by CFG.

    Kwon et al. 2025, arXiv:2503.18137. That direction is the first right singular vector of the 2 x
    n matrix of an image's two predictions. With the Gram matrix ``[[a, b], [b, d]]`` and ``D =
    hypot(a - d, 2 b)`` the projection is ``b / D * cond + (1 - (a - d) / D) / 2 * uncond``: two
    inner products instead of a singular value decomposition. Where the predictions are orthogonal
    and equally long no direction is first, and the conditional one is taken.
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float = auto(
        CALL, "1 is off; the paper: 7.5 for SD 1.5, 5 for SDXL, 7 for SD3", usual=(1.0, 15.0)
    )

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        c, u = latent(cond, step), latent(uncond, step)
        a, b, d = c.square().sum(1), (c * u).sum(1), u.square().sum(1)
        spread = torch.hypot(a - d, 2.0 * b)
        safe = spread.clamp_min(1e-30)
        of_cond = b / safe
        of_uncond = torch.where(spread > 0.0, 0.5 * (1.0 - (a - d) / safe), torch.zeros_like(a))
        tangential = column(of_cond, cond) * wide(cond) + column(of_uncond, uncond) * wide(uncond)
        return step.mix(wide(cond), tangential, self.scale).to(cond.dtype), None
