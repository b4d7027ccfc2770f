"""What guidances by skipped blocks share: a third pass that is the conditional model without some
of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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
    filled,
)
from diffalign.core.option import completed, derived
from diffalign.guidance.cfg import passes_at
from diffalign.seams.blocks.sites import select

SKIPPED = Pass("cond-skipped", True)


@dataclass(frozen=True, slots=True)
class SkippedBlocks(Windowed, TwoBranches[None]):
    """Mixes to ``uncond + scale * (cond - uncond) + push * (cond - skipped)`` while its window is
    open, and by plain CFG elsewhere.

    Subclasses say how strong ``push`` is and which blocks a step skips.
    """

    scale: float = auto(CALL, "1 is off for the CFG part", usual=(1.0, 15.0))
    # blocks that may be skipped
    names: tuple[str, ...] = derived(())

    @property
    def push(self) -> float:
        """Weight of the skipped pass; 0 is plain CFG, without that pass."""
        raise NotImplementedError

    def blocks_at(self, index: int) -> tuple[str, ...]:
        """Names of the blocks that step ``index`` skips."""
        raise NotImplementedError

    def with_names(
        self, context: Context, option: str, blocks: tuple[int | str, ...] | None
    ) -> Self:
        """A resolved copy that knows the names of its blocks.

        ``option`` is where the user says which ``blocks``; without a module (an oracle), they are
        the names. Raises: ``UnsupportedModel`` for a window without steps, or where no block fits.
        """
        owner, count = type(self).__name__, context.steps
        inside = (self.active(StepInfo(i, count, 0.0)) for i in range(count))
        if count and self.sigma is None and not any(inside):
            raise UnsupportedModel(
                f"{owner}: none of {count} steps lies in the window start={self.start}, "
                f"stop={self.stop}; widen it, or give sigma=(lo, hi)."
            )
        if context.module is not None:
            names = select(owner, option, context.module, blocks)
        elif blocks is not None:
            names = tuple(map(str, blocks))
        else:
            raise ValueError(
                f"{owner}({option}=...) must name the blocks where there is no denoiser to list "
                "them; got None."
            )
        return completed(filled(self, context), names=names)

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        plain = passes_at(self.scale)
        if self.push == 0.0 or not self.active(step):
            return plain
        with_cond = plain if COND in plain else CFG_PASSES
        return (*with_cond, Pass(SKIPPED.name, True, blocks=self.blocks_at(step.index)))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        plain = {name: value for name, value in preds.items() if name != SKIPPED}
        guided, _ = TwoBranches.combine(self, plain, step, None)
        if SKIPPED not in preds:
            return guided, None
        cond, skipped = (preds[name].to(guided.dtype) for name in (COND, SKIPPED))
        return guided + self.push * (cond - skipped), None

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        return step.mix(cond, uncond, self.scale), None
