"""Guidance weighted by a Beta density over progress, with a normalised difference."""

import math
from dataclasses import KW_ONLY, dataclass

from diffalign.core import (
    CALL,
    CFG_PASSES,
    COND,
    UNCOND,
    Pass,
    StepInfo,
    Tensor,
    TwoBranches,
    auto,
    option,
)
from diffalign.guidance.per_image import mix_rows, rowwise


@dataclass(frozen=True, slots=True)
class BetaCFG(TwoBranches[None]):
    """Adds ``scale * Beta(progress; a, b) * (c - u) / |c - u|^gamma`` to ``u``.

    Malarz et al. 2025, arXiv:2502.10574, on noise predictions. The density is 0 at the first and
    last step, which run the unconditional model. ``scale`` is the usual guidance scale (1 is off)
    only for ``gamma`` 0 and ``a`` = ``b`` = 1, where this is CFG to the bit; with ``gamma`` 1 the
    difference has norm ``scale * Beta``. Norms are over all values of an image.
    Cost: 2 passes per step; 1 where the density is 0. On pipelines with a call per branch the first
    step evaluates one conditional row more, to learn the prediction's shape.
    """

    scale: float = auto(CALL, "weight of the normalised difference", usual=(1.0, 15.0))
    _: KW_ONLY
    a: float = option(2.0, "first parameter of the density", low=1.0, high=1e3, usual=(1.0, 8.0))
    b: float = option(2.0, "second parameter of the density", low=1.0, high=1e3, usual=(1.0, 8.0))
    gamma: float = option(
        1.0, "how far the norm is taken out: 0 not at all, 1 wholly", low=0.0, high=1.0
    )

    @property
    def needs_uncond(self) -> bool:
        return True

    def density(self, progress: float) -> float:
        """The Beta(a, b) density at ``progress`` in [0, 1]."""
        log_norm = math.lgamma(self.a + self.b) - math.lgamma(self.a) - math.lgamma(self.b)
        return (
            math.exp(log_norm)
            * math.pow(progress, self.a - 1.0)
            * math.pow(1.0 - progress, self.b - 1.0)
        )

    def weight(self, step: StepInfo) -> float:
        """The weight before normalisation; a single step has no progress and gets ``scale``."""
        return self.scale * (self.density(step.progress) if step.count > 1 else 1.0)

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        weight = self.weight(step)
        if weight == 0.0:
            return (UNCOND,)
        return (COND,) if weight == 1.0 and self.gamma == 0.0 else CFG_PASSES

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if self.gamma == 0.0:
            return step.mix(cond, uncond, self.weight(step)), None
        c, u = (rowwise(step.convert(value, "native", "eps")) for value in (cond, uncond))
        norm = (c - u).norm(dim=1).clamp_min(1e-30)
        return mix_rows(step, cond, uncond, self.weight(step) / norm**self.gamma), None
