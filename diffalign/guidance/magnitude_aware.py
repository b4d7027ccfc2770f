"""Less guidance where the two predictions differ much (MAMBO-G, 2025, arXiv:2508.03442)."""

from dataclasses import KW_ONLY, dataclass

from diffalign.core import CALL, StepInfo, Tensor, TwoBranches, auto, option
from diffalign.guidance.per_image import latent, mix_rows


@dataclass(frozen=True, slots=True)
class MagnitudeAware(TwoBranches[None]):
    """Lowers each image's scale to ``1 + (scale - 1) * exp(-alpha * |c - u| / |u|)``.

    MAMBO-G, 2025, arXiv:2508.03442. Norms are over all values of the model's own output.
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float = auto(
        CALL,
        "the scale where both predictions agree; 1 is off, the paper uses 10",
        usual=(1.0, 20.0),
    )
    _: KW_ONLY
    alpha: float = option(
        8.0,
        "how fast the scale falls with the relative difference; 0 is CFG to the bit",
        low=0.0,
        high=1e6,
        usual=(0.0, 20.0),
    )

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if self.alpha == 0.0:
            return step.mix(cond, uncond, self.scale), None
        c, u = latent(cond, step), latent(uncond, step)
        ratio = (c - u).norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)
        weight = 1.0 + (self.scale - 1.0) * (-self.alpha * ratio).exp()
        return mix_rows(step, cond, uncond, weight), None
