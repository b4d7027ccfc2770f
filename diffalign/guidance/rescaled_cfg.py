"""Guidance whose standard deviation is brought back to the conditional model's."""

from dataclasses import KW_ONLY, dataclass

from diffalign.core import CALL, StepInfo, Tensor, TwoBranches, auto, option
from diffalign.guidance.per_image import column, latent, wide


@dataclass(frozen=True, slots=True)
class RescaledCFG(TwoBranches[None]):
    """Guides to ``d`` by CFG, then returns ``phi * d * std(cond) / std(d) + (1 - phi) * d``.

    Lin et al. 2023, arXiv:2305.08891, eq. 15-16. The deviation is over all values of an image, of
    the model's own output (the paper's models predict v).
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float = auto(CALL, "1 is off", usual=(1.0, 15.0))
    _: KW_ONLY
    phi: float = option(
        0.7, "share of the rescaled prediction, 0.7 in the paper; 0 is CFG", low=0.0, high=1.0
    )

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        guided = step.mix(cond, uncond, self.scale)
        if self.phi == 0.0:
            return guided, None
        ratio = latent(cond, step).std(1) / latent(guided, step).std(1).clamp_min(1e-30)
        factor = self.phi * ratio + (1.0 - self.phi)
        return (column(factor, guided) * wide(guided)).to(guided.dtype), None
