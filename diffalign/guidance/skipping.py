"""What guidances by skipped blocks share: a third pass that is the conditional model without some
of its blocks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, UnsupportedModel, Windowed
from diffalign.core.checks import check_range, check_scale
from diffalign.guidance.base import Guidance
from diffalign.guidance.cfg import CFG
from diffalign.seams.blocks.sites import select

SKIPPED = "cond-skipped"


@dataclass(frozen=True, slots=True)
class SkippedBlocks(Windowed, Guidance[None]):
    """``uncond + scale * (cond - uncond) + push * (cond - skipped)`` while the window is open,
    plain CFG elsewhere.

    Subclasses say which blocks a step skips and what ``push`` is called; ``names`` are the blocks
    of the resolved technique.
    """

    push_name: ClassVar[str]

    scale: float | None = None
    names: tuple[str, ...] = dataclasses.field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        owner, default = type(self).__name__, {f.name: f.default for f in dataclasses.fields(self)}
        check_scale(owner, self.scale)
        check_range(owner, self.push_name, self.push, -sys.float_info.max, sys.float_info.max)
        if self.sigma is not None and (self.start, self.stop) == (
            default["start"],
            default["stop"],
        ):
            object.__setattr__(self, "start", 0.0)
            object.__setattr__(self, "stop", 1.0)
        self.check_window()

    @property
    def push(self) -> float:
        """Weight of the skipped pass; 0 is plain CFG, without that pass."""
        value: float = getattr(self, self.push_name)
        return value

    def chosen(self, index: int) -> tuple[str, ...]:
        """Names of the blocks that step ``index`` skips."""
        raise NotImplementedError

    def with_names(
        self, context: Context, option: str, wanted: tuple[int | str, ...] | None
    ) -> tuple[Self, dict[str, str]]:
        """A resolved copy that knows the names of its blocks.

        Without a module (an oracle), ``wanted`` are the names.
        """
        made, sources = Guidance.resolve(self, context)
        owner, count = type(self).__name__, context.steps
        if (
            count
            and self.sigma is None
            and not any(self.active(StepInfo(i, count, 0.0)) for i in range(count))
        ):
            raise UnsupportedModel(
                f"{owner}: none of {count} steps lies in the window start={self.start}, "
                f"stop={self.stop}; widen it, or give sigma=(lo, hi)."
            )
        if context.module is None:
            if wanted is None:
                raise ValueError(
                    f"{owner}({option}=...) must name the blocks where there is no denoiser to "
                    "list them; got None."
                )
            names = tuple(map(str, wanted))
        else:
            names = select(owner, option, context.module, wanted)
        made = dataclasses.replace(made)
        object.__setattr__(made, "names", names)
        return made, sources

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        plain = CFG(self.scale).passes(step, None)
        if self.push == 0.0 or not self.active(step):
            return plain
        both = plain if COND in plain else (COND, *plain)
        return (*both, Pass(SKIPPED, True, blocks=self.chosen(step.index)))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        skipped = preds.get(Pass(SKIPPED, True))
        if skipped is None:
            return CFG(self.scale).combine(preds, step, None)
        cond, uncond = preds[COND], preds.get(UNCOND)
        assert self.scale is not None
        guided = cond if uncond is None else step.mix(cond, uncond, self.scale)
        return guided + self.push * (cond.to(guided.dtype) - skipped.to(guided.dtype)), None
