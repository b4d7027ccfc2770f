"""Kernels of attention techniques, each chosen once per shape and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Kernels:
    """The kernels of one generation; ``notes`` are those of its report."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        # (operation, key) -> the kernel chosen for it
        self._calls: dict[tuple[str, Any], Any] = {}

    def __call__(self, op: str, key: Any, make: Callable[[], Any]) -> Any:
        """The callable of a ``Choice``, made once per key; its reason goes into the report."""
        if (op, key) not in self._calls:
            choice = make()
            self._calls[op, key] = choice.call
            note = f"{op} kernel: {choice.reason}"
            reason = note.partition(" (")[0]  # without the sizes of this layer
            if not any(other.startswith(reason) for other in self.notes):
                self.notes.append(note)
        return self._calls[op, key]
