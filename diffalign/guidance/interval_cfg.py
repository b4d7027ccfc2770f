"""Guidance inside a band of noise levels only."""

from dataclasses import dataclass

from diffalign.core import CALL, COND, Pass, StepInfo, Tensor, TwoBranches, Windowed, auto
from diffalign.guidance.cfg import passes_at


@dataclass(frozen=True, slots=True)
class IntervalCFG(Windowed, TwoBranches[None]):
    """Guides while its window is open; the conditional model runs elsewhere.

    Kynkäänniemi et al. 2024, arXiv:2404.07724. The paper's bands are (0.19, 1.61) for EDM2-XXL and
    (0.28, 5.42) for SDXL. The default window is always open.
    Differs from the paper: the band is half-open as [lo, hi), the paper's is (lo, hi].
    Cost: 2 passes per step inside the window, 1 outside.
    """

    scale: float = auto(CALL, "1 is off", usual=(1.0, 15.0))

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return passes_at(self.scale) if self.active(step) else (COND,)

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        return step.mix(cond, uncond, self.scale), None
