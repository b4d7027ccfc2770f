"""What guidances by skipped blocks share: a third pass that is the conditional model without some
of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from diffalign.core import Context, Pass, StepInfo, filled
from diffalign.core.option import completed, derived
from diffalign.guidance.pushed import PushedAway
from diffalign.seams.blocks.sites import select

SKIPPED = Pass("cond-skipped", True)


@dataclass(frozen=True, slots=True)
class SkippedBlocks(PushedAway):
    """Pushes away from the conditional model without some of its blocks.

    Subclasses say how strong ``push`` is and which blocks a step skips.
    """

    # blocks that may be skipped
    names: tuple[str, ...] = derived(())

    def blocks_at(self, index: int) -> tuple[str, ...]:
        """Names of the blocks that step ``index`` skips."""
        raise NotImplementedError

    def worse(self, step: StepInfo) -> Pass:
        return Pass(SKIPPED.name, True, blocks=self.blocks_at(step.index))

    def with_names(
        self, context: Context, option: str, blocks: tuple[int | str, ...] | None
    ) -> Self:
        """A resolved copy that knows the names of its blocks.

        ``option`` is where the user says which ``blocks``; without a module (an oracle), they are
        the names. Raises: ``UnsupportedModel`` for a window without steps, or where no block fits.
        """
        self.check_steps(context)
        owner = type(self).__name__
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
