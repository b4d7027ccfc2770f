"""What every state that travels with images can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar, runtime_checkable


@runtime_checkable
class Rows(Protocol):
    """State of a batch of images: copied and reordered when a search drops or multiplies images."""

    def select(self, rows: Sequence[int]) -> Self:
        """The state of those images, in that order; an image may appear more than once."""
        ...


R = TypeVar("R", bound=Rows)


def select_rows(state: R | None, rows: Sequence[int]) -> R | None:
    """``state.select(rows)``; None, the state of a technique that remembers nothing, stays None."""
    return None if state is None else state.select(rows)
