"""The contract of a guidance: name the evaluations a step needs, combine their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from diffalign.core.technique import Seam, Technique
from diffalign.core.types import CFG_PASSES, COND, UNCOND, Json, Pass, Space, StepInfo

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")


class Guidance(Technique, Generic[S]):
    """Base of every guidance. ``S`` is its state, which has ``select(rows)``, or None.

    A technique without a norm, a cosine or a projection works on predictions as the model makes
    them; one with any of these names ``combine_space``, and the seam converts.
    """

    __slots__ = ()
    seam: ClassVar[Seam] = "denoiser"
    # the space in which ``combine`` receives and returns predictions
    combine_space: ClassVar[Space] = "native"
    # whether it acts without the unconditional branch, so that models whose guidance is distilled
    # can have it
    acts_alone: ClassVar[bool] = False

    @property
    def needs_uncond(self) -> bool:
        """False when no step can ask for the unconditional branch: it is then not even encoded."""
        return True

    @property
    def extra_passes(self) -> tuple[Pass, ...]:
        """Passes with a change of attention or a denoiser of their own, of a resolved technique:
        what they name is put in place before the first step."""
        return ()

    @property
    def cosine_space(self) -> Literal["eps", "x0"]:
        """The space in which the report compares the two branches."""
        return "eps"

    def init(self, batch: int) -> S:
        """State before the first step, for ``batch`` images."""
        return None  # type: ignore[return-value]

    def passes(self, step: StepInfo, state: S) -> tuple[Pass, ...]:
        """The evaluations this step needs; nothing else is run or paid for."""
        raise NotImplementedError

    def combine(self, preds: Mapping[Pass, Tensor], step: StepInfo, state: S) -> tuple[Tensor, S]:
        """The guided prediction [B, ...], of the shape and dtype of the inputs, and the next state.

        Must not change its arguments. A solver's second evaluation of a step arrives with
        ``step.evaluation == 1``: decide at evaluation 0 only.
        """
        raise NotImplementedError

    def extras(self, state: S) -> Json:
        """What the report says beyond scale and cosine, as JSON data, after the last step."""
        return {}


class TwoBranches(Guidance[S]):
    """A rule on both predictions, which most guidances are: subclasses write ``guide``.

    At ``scale`` 1 the conditional model runs alone; ``passes`` may ask for one branch at other
    steps too, and its prediction is then the guided one.
    """

    __slots__ = ()
    scale: float

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def passes(self, step: StepInfo, state: S) -> tuple[Pass, ...]:
        return (COND,) if self.scale == 1.0 else CFG_PASSES

    def combine(self, preds: Mapping[Pass, Tensor], step: StepInfo, state: S) -> tuple[Tensor, S]:
        if len(preds) == 1:
            return next(iter(preds.values())), state
        return self.guide(preds[COND], preds[UNCOND], step, state)

    def guide(self, cond: Tensor, uncond: Tensor, step: StepInfo, state: S) -> tuple[Tensor, S]:
        """The guided prediction from both, [B, ...], and the next state."""
        raise NotImplementedError
