"""Which techniques act, where and when: what the report says of attention and block techniques."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, TypeVar

from diffalign.core import StepInfo, Technique
from diffalign.core.registry import name_of
from diffalign.core.window import never_acted
from diffalign.seams.denoiser.record import Record

T = TypeVar("T", bound=Technique)


class Activity(Generic[T]):
    """What each technique of one seam did in one generation."""

    def __init__(self, techniques: Sequence[T], record: Record) -> None:
        # those that are not off, outermost first
        self.techniques = techniques
        self.record = record
        # technique -> steps in which it acted
        self._steps: dict[str, set[int]] = {}
        # (technique, denoiser, layer or block) that have met
        self._places: set[tuple[str, str, str]] = set()
        # techniques that act at every step whatever their window, None before the first
        self._always: set[T] | None = None

    def active(self, step: StepInfo) -> tuple[T, ...]:
        """The techniques that act at a step, outermost first."""
        if self._always is None:
            self._always = {t for t in self.techniques if self._begins_too_late(t, step)}
        active = tuple(t for t in self.techniques if t in self._always or t.active(step))
        for technique in active:
            self._steps.setdefault(type(technique).__name__, set()).add(self.record.number(step))
        return active

    def _begins_too_late(self, technique: T, first: StepInfo) -> bool:
        """Whether the model's default window ends before the run begins, as in image-to-image.

        The technique then acts at every step.
        """
        options = self.record.resolved.get(name_of(technique), {})
        window, source = options.get("sigma", (None, ""))
        begin = first.sigma if self.record.first is None else self.record.first
        if not source or begin >= window[0]:
            return False
        options["sigma"] = (
            (0.0, math.inf),
            f"the run begins at {begin:.3g}, below {window[0]:g} of {source}",
        )
        return True

    def acts(self, technique: T, step: StepInfo) -> None:
        """What a pass changes acts at a step."""
        self._steps.setdefault(type(technique).__name__, set()).add(self.record.number(step))

    def note(self, technique: T, denoiser: str, place: str) -> None:
        """A technique acted at a layer or block of a denoiser."""
        self._places.add((type(technique).__name__, denoiser, place))

    def places(self, technique: T) -> int:
        """Number of layers or blocks at which a technique acted."""
        return sum(name == type(technique).__name__ for name, _, _ in self._places)

    def finish(self, selected: dict[T, int], complete: bool) -> None:
        """Tell the report where techniques acted, out of how many places that each selects.

        After a ``complete`` generation also which never did, as a note and a warning.
        """
        record = self.record
        for technique, count in selected.items():
            name = type(technique).__name__
            record.layers[name] = (self.places(technique), count)
            record.acted[name] = len(self._steps.get(name, ()))
        for technique in self.techniques if complete and record.sigma else ():
            if not self.places(technique):
                record.notes.append(never_acted(type(technique).__name__, record.sigma))
