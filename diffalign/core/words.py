"""The vocabulary of a text encoder, and texts that are not made of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shift:
    """Something added to the embeddings of a run of tokens, wherever a text has these tokens."""

    tokens: tuple[int, ...]
    # [len(tokens), D]
    values: Tensor


class Words(Protocol):
    """What a method that writes texts knows of a text encoder with V tokens of D numbers."""

    @property
    def table(self) -> Tensor:
        """Embeddings [V, D] of all tokens."""
        ...

    @property
    def room(self) -> int:
        """Tokens of a text that fit, marks of start and end not counted."""
        ...

    @property
    def marks(self) -> frozenset[int]:
        """Tokens that are no part of any text."""
        ...

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without the marks; a text that is too long is cut."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens. ``tokens(text(x))`` need not be ``x``."""
        ...

    def features(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Features [R, F] of token rows [R, M] whose embeddings are those [R, M, D], or the
        table's; differentiable in them."""
        ...
