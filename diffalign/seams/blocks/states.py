"""What block techniques remember, row by row of the denoiser calls that they have seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.core.rows import join_rows, select_rows
from diffalign.seams.denoiser.call import DenoiserCall

Row = tuple[str, int]
"""Name of a pass and the image; a row that repeats another with a second text is "... copy"."""


def rows_of(call: DenoiserCall, batch: int) -> tuple[Row, ...]:
    """Whose rows a denoiser call has, for ``batch`` images."""
    images = call.images(batch)
    sizes = [batch if p.rows is None else len(p.rows) for p in call.passes]
    if sum(sizes) != len(images) - len(call.copies):
        sizes = [batch] * len(sizes)  # compiled and cached models run whole branches
    names = [p.name for p, size in zip(call.passes, sizes) for _ in range(size)]
    names += [f"{names[row]} copy" for row, _ in call.copies]
    return tuple(zip(names, images))


@dataclass(frozen=True, slots=True)
class BlockStates:
    """The states of one block technique; every row is in one of them.

    Rows that have not run in one call before begin anew.
    """

    # (denoiser, the rows of a state in its order, the state)
    parts: tuple[tuple[str, tuple[Row, ...], Any], ...] = ()

    def of(self, denoiser: str, rows: tuple[Row, ...], init: Callable[[int], Any]) -> Any:
        """The state of ``rows``, in that order."""
        for name, known, state in self.parts:
            if name != denoiser or not set(rows) <= set(known):
                continue
            return state if known == rows else select_rows(state, list(map(known.index, rows)))
        return init(len(rows))

    def after(self, denoiser: str, rows: tuple[Row, ...], state: Any) -> BlockStates:
        """The states once ``rows`` have the state ``state``; others keep theirs."""
        parts = []
        for name, known, other in self.parts:
            rest = tuple(row for row in known if name != denoiser or row not in rows)
            if rest:
                other = other if rest == known else select_rows(other, list(map(known.index, rest)))
                parts.append((name, rest, other))
        return BlockStates((*parts, (denoiser, rows, state)))

    def select(self, rows: Sequence[int]) -> BlockStates:
        """The states of those images, in that order."""
        parts = []
        for denoiser, known, state in self.parts:
            names = dict.fromkeys(name for name, _ in known)
            pairs = [
                ((name, new), known.index((name, image)))
                for name in names
                for new, image in enumerate(rows)
                if (name, image) in known
            ]
            if pairs:
                places, indices = zip(*pairs)
                parts.append((denoiser, places, select_rows(state, list(indices))))
        return BlockStates(tuple(parts))

    def join(self, others: Sequence[BlockStates], sizes: Sequence[int]) -> BlockStates:
        """The states of all images.

        Raises: ValueError where their rows have run in different calls.
        """
        states = [self, *others]
        if len({tuple((name, *_names(rows)) for name, rows, _ in s.parts) for s in states}) > 1:
            raise ValueError("join: block techniques have seen different calls in the states.")
        parts = []
        for i, (denoiser, _, _) in enumerate(self.parts):
            known = [state.parts[i][1] for state in states]
            rows = tuple(
                (name, image + sum(sizes[:k]))
                for k, places in enumerate(known)
                for name, image in places
            )
            joined = join_rows([state.parts[i][2] for state in states], list(map(len, known)))
            parts.append((denoiser, rows, joined))
        return BlockStates(tuple(parts))


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The passes of some rows."""
    return tuple(dict.fromkeys(name for name, _ in rows))
