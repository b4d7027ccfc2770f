"""Classifier-free guidance: the smallest technique, and what techniques with a weight share."""

from dataclasses import dataclass

from diffalign.core import CALL, CFG_PASSES, COND, UNCOND, Pass, StepInfo, Tensor, TwoBranches, auto


def passes_at(weight: float) -> tuple[Pass, ...]:
    """What guidance of this weight needs: one branch where the other has no part in it."""
    if weight == 1.0:
        return (COND,)
    return (UNCOND,) if weight == 0.0 else CFG_PASSES


@dataclass(frozen=True, slots=True)
class CFG(TwoBranches[None]):
    """Mixes both predictions at every step: ``uncond + scale * (cond - uncond)``.

    Ho and Salimans 2022, arXiv:2207.12598, eq. 6. The arithmetic is the pipeline's own, so the
    result is bit-identical to its native guidance.
    Cost: 2 passes per step; 1 where ``scale`` is 0 or 1.
    """

    scale: float = auto(CALL, "1 is off, 0 the unconditional model", usual=(1.0, 15.0))

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return passes_at(self.scale)

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        return step.mix(cond, uncond, self.scale), None


class WeightedCFG(TwoBranches[None]):
    """Classifier-free guidance whose weight depends on the step; subclasses write ``weight``."""

    __slots__ = ()

    @property
    def needs_uncond(self) -> bool:
        return True

    def weight(self, step: StepInfo) -> float:
        """The guidance weight at this step; 1 is the conditional model, 0 the unconditional one."""
        raise NotImplementedError

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return passes_at(self.weight(step))

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        return step.mix(cond, uncond, self.weight(step)), None
