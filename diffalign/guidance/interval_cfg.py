"""Guidance inside a band of noise levels only (Kynkäänniemi et al. 2024, arXiv:2404.07724)."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.core import COND, UNCOND, Pass, StepInfo, Tensor, Windowed
from diffalign.core.checks import check_scale
from diffalign.guidance.base import Guidance
from diffalign.guidance.cfg import CFG


@dataclass(frozen=True, slots=True)
class IntervalCFG(Windowed, Guidance[None]):
    """Classifier-free guidance while the window is open, the conditional model elsewhere
    (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    ``scale``: 1 is off, None the pipeline's own value. The window is ``sigma=(lo, hi)`` in noise
    levels (the paper: EDM2-XXL (0.19, 1.61), SDXL (0.28, 5.42)) or ``start``, ``stop`` in fractions
    of the steps; the default window is always open.
    Differs from the paper: the band is half-open as [lo, hi), the paper's is (lo, hi].
    Cost: 2 passes per step inside the window, 1 outside.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        check_scale("IntervalCFG", self.scale)
        self.check_window()

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return CFG(self.scale).passes(step, None) if self.active(step) else (COND,)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if len(preds) == 1:
            return next(iter(preds.values())), None
        assert self.scale is not None
        return step.mix(preds[COND], preds[UNCOND], self.scale), None
