"""Less guidance where the two predictions differ much (MAMBO-G, 2025, arXiv:2508.03442)."""

from dataclasses import KW_ONLY, dataclass

from diffalign.core import StepInfo, Tensor
from diffalign.core.checks import check_range, check_scale
from diffalign.guidance.per_row import BothBranches, latent, mix_rows


@dataclass(frozen=True, slots=True)
class MagnitudeAware(BothBranches):
    """CFG with the scale ``1 + (scale - 1) * exp(-alpha * |c - u| / |u|)`` for each image
    (arXiv:2508.03442).

    ``scale``: the scale where both predictions agree; 1 is off, None the pipeline's own value (the
    paper uses 10). ``alpha`` >= 0: how fast it falls with the relative difference, 8 in the paper;
    0 is CFG to the bit. Norms are over all values of the model's own output.
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float | None = None
    _: KW_ONLY
    alpha: float = 8.0

    def __post_init__(self) -> None:
        check_scale("MagnitudeAware", self.scale)
        check_range("MagnitudeAware", "alpha", self.alpha, 0.0, 1e6)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, step: StepInfo) -> Tensor:
        if self.alpha == 0.0:
            return step.mix(cond, uncond, scale)
        c, u = latent(cond, step), latent(uncond, step)
        ratio = (c - u).norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)
        return mix_rows(step, cond, uncond, 1.0 + (scale - 1.0) * (-self.alpha * ratio).exp())
