"""What guidances by a worse version of the same model share: a third pass, from which the result is
pushed away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    Windowed,
    auto,
)
from diffalign.guidance.cfg import passes_at


@dataclass(frozen=True, slots=True)
class PushedAway(Windowed, TwoBranches[None]):
    """Mixes to ``uncond + scale * (cond - uncond) + push * (cond - worse)`` while its window is
    open, and by plain CFG elsewhere.

    Subclasses say how strong ``push`` is and what the pass ``worse`` is.
    """

    scale: float = auto(CALL, "1 is off for the CFG part", usual=(1.0, 15.0))

    @property
    def push(self) -> float:
        """Weight of the worse pass; 0 is plain CFG, without that pass."""
        raise NotImplementedError

    def worse(self, step: StepInfo) -> Pass:
        """The conditional model made worse, as this step needs it."""
        raise NotImplementedError

    def check_steps(self, context: Context) -> None:
        """Raise ``UnsupportedModel`` for a window without steps."""
        owner, count = type(self).__name__, context.steps
        inside = (self.active(StepInfo(i, count, 0.0)) for i in range(count))
        if count and self.sigma is None and not any(inside):
            raise UnsupportedModel(
                f"{owner}: none of {count} steps lies in the window start={self.start}, "
                f"stop={self.stop}; widen it, or give sigma=(lo, hi)."
            )

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        plain = passes_at(self.scale)
        if self.push == 0.0 or not self.active(step):
            return plain
        with_cond = plain if COND in plain else CFG_PASSES
        return (*with_cond, self.worse(step))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        name = self.worse(step)
        plain = {p: prediction for p, prediction in preds.items() if p != name}
        guided, _ = TwoBranches.combine(self, plain, step, None)
        if name not in preds:
            return guided, None
        cond, worse = (preds[p].to(guided.dtype) for p in (COND, name))
        return guided + self.push * (cond - worse), None

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        return step.mix(cond, uncond, self.scale), None
