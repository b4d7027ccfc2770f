"""Which techniques act, where and when, and with which kernels: what the report says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffalign.core import AttentionTechnique, Site, StepInfo
from diffalign.core.registry import name_of
from diffalign.core.window import never_acted
from diffalign.seams.denoiser.record import Record


class Activity:
    """What each attention technique did in one generation."""

    def __init__(self, techniques: Sequence[AttentionTechnique], record: Record) -> None:
        # those that are not off, outermost first
        self.techniques = techniques
        self.record = record
        # technique -> steps in which it acted
        self.steps: dict[str, set[int]] = {type(t).__name__: set() for t in techniques}
        # (technique, denoiser, layer) that have met
        self._places: set[tuple[str, str, str]] = set()
        # techniques that act at every step whatever their window, None before the first
        self._always: set[AttentionTechnique] | None = None
        # (operation, key) -> the kernel chosen for it
        self._kernels: dict[tuple[str, Any], Any] = {}

    def active(self, step: StepInfo) -> tuple[AttentionTechnique, ...]:
        """The techniques that act at a step, outermost first."""
        if self._always is None:
            self._always = {t for t in self.techniques if self._begins_too_late(t, step)}
        active = tuple(t for t in self.techniques if t in self._always or t.active(step))
        for technique in active:
            self.steps[type(technique).__name__].add(step.index)
        return active

    def _begins_too_late(self, technique: AttentionTechnique, first: StepInfo) -> bool:
        """Whether the model's default window ends before the run begins, as in image-to-image.

        The technique then acts at every step.
        """
        options = self.record.resolved.get(name_of(technique), {})
        window, source = options.get("sigma", (None, ""))
        if not source or first.sigma >= window[0]:
            return False
        options["sigma"] = (
            (0.0, math.inf),
            f"the run begins at {first.sigma:.3g}, below {window[0]:g} of {source}",
        )
        return True

    def note(self, denoiser: str, site: Site, techniques: Iterable[AttentionTechnique]) -> None:
        """Techniques met a layer; those that select it act there."""
        self._places.update(
            (type(t).__name__, denoiser, site.layer) for t in techniques if t.selects(site)
        )

    def layers(self, technique: AttentionTechnique) -> int:
        """Number of layers at which a technique acted."""
        return sum(name == type(technique).__name__ for name, _, _ in self._places)

    def kernel(self, op: str, key: Any, make: Callable[[], Any]) -> Any:
        """The callable of a ``Choice``, made once per key; its reason goes into the report."""
        if (op, key) not in self._kernels:
            choice = make()
            self._kernels[op, key] = choice.call
            note = f"{op} kernel: {choice.reason}"
            reason = note.partition(" (")[0]  # without the sizes of this layer
            if not any(other.startswith(reason) for other in self.record.notes):
                self.record.notes.append(note)
        return self._kernels[op, key]

    def note_silent(self) -> None:
        """A note and a warning about each technique whose window held no step of the run."""
        for technique in self.techniques if self.record.sigma else ():
            if not self.layers(technique):
                self.record.notes.append(never_acted(type(technique).__name__, self.record.sigma))
