"""Guidance whose standard deviation is brought back to the conditional model's (Lin et al.

2023, arXiv:2305.08891).
"""

from dataclasses import KW_ONLY, dataclass

from diffalign.core import StepInfo, Tensor
from diffalign.core.checks import check_range, check_scale
from diffalign.guidance.per_row import BothBranches, column, latent, wide


@dataclass(frozen=True, slots=True)
class RescaledCFG(BothBranches):
    """CFG, then ``phi * d * std(cond) / std(d) + (1 - phi) * d`` per image (Lin et al. 2023,
    arXiv:2305.08891, eq. 15-16).

    ``scale``: 1 is off, None the pipeline's own value. ``phi`` in [0, 1]: share of the rescaled
    prediction; 0 is CFG, the paper uses 0.7. The deviation is over all values of an image, of the
    model's own output (the paper's models predict v).
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float | None = None
    _: KW_ONLY
    phi: float = 0.7

    def __post_init__(self) -> None:
        check_scale("RescaledCFG", self.scale)
        check_range("RescaledCFG", "phi", self.phi, 0.0, 1.0)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, step: StepInfo) -> Tensor:
        guided = step.mix(cond, uncond, scale)
        if self.phi == 0.0:
            return guided
        ratio = latent(cond, step).std(1) / latent(guided, step).std(1).clamp_min(1e-30)
        factor = self.phi * ratio + (1.0 - self.phi)
        return (column(factor, guided) * wide(guided)).to(guided.dtype)
