"""Frequency-decoupled guidance: one scale for the layout of an image, another for its details."""

from dataclasses import KW_ONLY, dataclass
from typing import Self

import torch
from torch.nn.functional import interpolate

from diffalign.core import (
    CALL,
    CFG_PASSES,
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
from diffalign.guidance.per_image import wide

BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
REFUSAL = (
    "FDG filters predictions [B, C, H, W]; {} predicts packed tokens, whose neighbours it cannot "
    "tell. Use APG against over-saturation."
)


def blurred(planes: Tensor) -> Tensor:
    """``planes [N, 1, H, W]`` through the binomial filter of pyramids, mirrored at the edges."""
    for axis in (2, 3):
        size = planes.shape[axis]
        period = max(2 * size - 2, 1)
        place = torch.arange(-2, size + 2, device=planes.device).abs() % period
        padded = planes.index_select(axis, torch.minimum(place, period - place))
        planes = (padded.unfold(axis, len(BLUR), 1) * padded.new_tensor(BLUR)).sum(-1)
    return planes


def details(x: Tensor) -> Tensor:
    """The first level of the Laplacian pyramid of ``x [..., H, W]``: what half the size loses."""
    whole = x.reshape(-1, 1, *x.shape[-2:])
    half = [-(-size // 2) for size in x.shape[-2:]]
    coarse = interpolate(blurred(whole), half, mode="bilinear")
    return x - blurred(interpolate(coarse, x.shape[-2:], mode="bilinear")).reshape(x.shape)


@dataclass(frozen=True, slots=True)
class FDG(TwoBranches[None]):
    """Guides the coarse structure of an image by ``scale`` and its details by ``high``.

    Sadat, Vontobel, Salehi and Weber 2025, arXiv:2506.19713: at high scales the low frequencies
    over-saturate and make images alike, while the high ones sharpen. The bands are the two levels
    of a Laplacian pyramid, which is linear: the result is CFG at ``scale`` plus ``(high - scale) *
    details(cond - uncond)``, the same in every parametrisation. With equal scales it is CFG.
    Differs from the paper: it gives both scales for each model (5 and 10 for SDXL, table 8 as
    diffusers quotes it), the default of ``high`` here follows ``scale``; sizes may be odd.
    Cost: 2 passes per step; 1 at scale 1.
    Raises: ``UnsupportedModel`` on models that predict packed tokens, such as Flux.
    """

    scale: float = auto(CALL, "scale of the coarse structure, 1 is off", usual=(1.0, 15.0))
    _: KW_ONLY
    high: float | None = option(
        None, "scale of the details; none is 2 * scale - 1", usual=(1.0, 20.0)
    )

    @property
    def needs_uncond(self) -> bool:
        return (self.scale, self.high) not in ((1.0, None), (1.0, 1.0))

    def resolve(self, context: Context) -> Self:
        if context.packed:
            raise UnsupportedModel(REFUSAL.format(context.pipeline))
        return filled(self, context)

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return CFG_PASSES if self.needs_uncond else (COND,)

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if cond.ndim < 4:
            raise UnsupportedModel(REFUSAL.format("this model"))
        guided = step.mix(cond, uncond, self.scale)
        high = 2.0 * self.scale - 1.0 if self.high is None else self.high
        if high == self.scale:
            return guided, None
        more = (high - self.scale) * details(wide(cond) - wide(uncond))
        return (wide(guided) + more).to(guided.dtype), None
