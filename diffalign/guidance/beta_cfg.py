"""Guidance weighted by a Beta density over progress, with a normalised difference (Malarz et al.

2025, arXiv:2502.10574).
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from diffalign.core import COND, UNCOND, Pass, StepInfo, Tensor
from diffalign.core.checks import check_range, check_scale, rowwise
from diffalign.guidance.base import Guidance
from diffalign.guidance.per_row import mix_rows


@dataclass(frozen=True, slots=True)
class BetaCFG(Guidance[None]):
    """``u + scale * Beta(p; a, b) * (c - u) / |c - u|^gamma`` with progress ``p`` and noise
    predictions (arXiv:2502.10574).

    ``scale``: weight of the normalised difference, None the pipeline's own value. It is the usual
    guidance scale (1 is off) only for ``gamma`` 0 and ``a`` = ``b`` = 1, where this is CFG to the
    bit; with ``gamma`` 1 the difference has norm ``scale * Beta``. ``a``, ``b`` >= 1: the density's
    parameters, 2 and 2 in the paper: no guidance, the unconditional model, at the first and last
    step. ``gamma`` in [0, 1]: how far the norm (over all values of an image) is taken out.
    Cost: 2 passes per step; 1 where the density is 0. On pipelines with a call per branch the first
    step evaluates one conditional row more, to learn the prediction's shape.
    """

    scale: float | None = None
    _: KW_ONLY
    a: float = 2.0
    b: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_scale("BetaCFG", self.scale)
        check_range("BetaCFG", "a", self.a, 1.0, 1e3)
        check_range("BetaCFG", "b", self.b, 1.0, 1e3)
        check_range("BetaCFG", "gamma", self.gamma, 0.0, 1.0)

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
        assert self.scale is not None
        return self.scale * (self.density(step.progress) if step.count > 1 else 1.0)

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        weight = self.weight(step)
        if weight == 0.0:
            return (UNCOND,)
        return (COND,) if weight == 1.0 and self.gamma == 0.0 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if len(preds) == 1:
            return next(iter(preds.values())), None
        cond, uncond = preds[COND], preds[UNCOND]
        if self.gamma == 0.0:
            return step.mix(cond, uncond, self.weight(step)), None
        c, u = (rowwise(step.convert(value, "native", "eps")) for value in (cond, uncond))
        return mix_rows(
            step,
            cond,
            uncond,
            self.weight(step) / (c - u).norm(dim=1).clamp_min(1e-30) ** self.gamma,
        ), None
