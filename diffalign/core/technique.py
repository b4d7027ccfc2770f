"""What every technique is: a frozen dataclass of options, resolved against a pipeline."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from diffalign.core.context import Context
from diffalign.core.option import CALL, check_options, filled, options_of
from diffalign.core.types import StepInfo

Seam = Literal["denoiser", "attention", "blocks", "tokens"]


class Technique:
    """Base of everything that ``apply`` takes; subclasses are frozen dataclasses.

    Options are fields made by ``option`` and ``auto``. A technique has no hidden memory: what
    changes while sampling is an explicit state.
    """

    __slots__ = ()
    # where it enters the pipeline; two techniques of the seam "denoiser" cannot act together
    seam: ClassVar[Seam]

    def __post_init__(self) -> None:
        check_options(self)
        self.check()

    def check(self) -> None:
        """Raise ValueError where options contradict each other; each alone is right already."""

    @property
    def off(self) -> bool:
        """True when the options make the technique the identity; nothing is then installed."""
        return False

    @property
    def reads_negative(self) -> bool:
        """Whether it uses the call's negative prompt at this setting."""
        return False

    @property
    def asked_scale(self) -> float | None:
        """The guidance scale that the user wrote; None where the pipeline's own is taken."""
        for name, spec in options_of(type(self)).items():
            if spec.source == CALL:
                value: float | None = getattr(self, name)
                return value
        return None

    def active(self, step: StepInfo) -> bool:
        """Whether it acts at this step; elsewhere the model runs as if it were not there."""
        return True

    def resolve(self, context: Context) -> Self:
        """A copy with every option filled in; ``context.sources`` says where each came from.

        Raises: ``UnsupportedModel`` when it cannot act on this pipeline, scheduler or call.
        """
        return filled(self, context)

    def refuses(self, context: Context) -> str | None:
        """Why it cannot act on this pipeline object, None when it can; asked after ``resolve``."""
        return None
