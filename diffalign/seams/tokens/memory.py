"""What calls that leave tokens out need of earlier ones: keys and values of all tokens, and the
last prediction of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.core.rows import join_rows, select_rows
from diffalign.kernels.tokens import WriteCall, choose
from diffalign.seams.blocks.states import BlockStates


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Memory:
    """Rows of one kind of denoiser call; compared by identity."""

    # attention layer -> keys and values of text and image [rows, A, L + N, D], in the order of the
    # layer's sequence; one head's lie side by side, which attention reads fastest
    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    # the last prediction of each token [rows, N, p]
    prediction: Tensor
    # step of the trajectory that wrote it last, and the blocks that it skipped
    step: int
    blocks: tuple[str, ...] | None

    def select(self, rows: Sequence[int]) -> Memory:
        """A copy of those rows, in that order."""
        index = torch.tensor(list(rows), device=self.prediction.device)

        def take(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {layer: tensor[index] for layer, tensor in tensors.items()}

        keys, values = take(self.keys), take(self.values)
        return Memory(keys, values, self.prediction[index], self.step, self.blocks)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class TokenStates:
    """What travels with the images of a run: the technique's state and what its calls remember."""

    # the technique's own state
    technique: Any
    # of every row that has run
    memories: BlockStates = field(default_factory=BlockStates)
    # step whose tokens ``computed`` names
    step: int = -1
    # [B, kept], None for all tokens
    computed: Tensor | None = None
    # whether the technique has seen the prediction of that step
    seen: bool = False

    def select(self, rows: Sequence[int]) -> TokenStates:
        """The states of those images, in that order."""
        computed = None if self.computed is None else self.computed[list(rows)]
        technique = select_rows(self.technique, rows)
        return TokenStates(technique, self.memories.select(rows), self.step, computed, self.seen)

    def join(self, others: Sequence[TokenStates], sizes: Sequence[int]) -> TokenStates:
        """The states of all images.

        Raises: ValueError where the states do not stand at the same step.
        """
        states = [self, *others]
        if len({(state.step, state.computed is None, state.seen) for state in states}) > 1:
            raise ValueError("join: the states have left out tokens at different steps.")
        parts = [state.computed for state in states if state.computed is not None]
        technique = join_rows([state.technique for state in states], sizes)
        memories = self.memories.join([state.memories for state in others], sizes)
        computed = torch.cat(parts) if parts else None
        return TokenStates(technique, memories, self.step, computed, self.seen)


def fresh(x: Tensor) -> Tensor:
    """Keys or values [rows, A, L + N, D] as a memory keeps them: a dense copy."""
    return x.clone(memory_format=torch.contiguous_format)


class Places:
    """Where the tokens of one call stand among all of its model's.

    ``index`` [rows, S]: the ``tokens`` N image tokens that it computes.
    """

    def __init__(self, index: Tensor, tokens: int) -> None:
        self.index, self.tokens = index, tokens
        # (heads, where the image of a sequence begins) -> what picks its tokens in [rows, A, ...]
        self._picks: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        # (heads, size of a head) -> what writes them
        self._writers: dict[tuple[int, int], WriteCall] = {}

    def pick(self, heads: int, begin: int) -> tuple[Tensor, Tensor, Tensor]:
        """What picks [rows, A, S] from sequences [rows, A, ...] whose image begins there."""
        if (heads, begin) not in self._picks:
            device = self.index.device
            rows = torch.arange(len(self.index), device=device)[:, None, None]
            columns = torch.arange(heads, device=device)[:, None]
            self._picks[heads, begin] = (rows, columns, self.index[:, None] + begin)
        return self._picks[heads, begin]

    def written(
        self, before: Sequence[Tensor], new: Sequence[Tensor], text_first: bool, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens [rows, A, L + N, D], those of this call among them.

        ``before`` [rows, A, any + N, D]: those of earlier calls; ``new`` [rows, A, L + S, D]: this
        call's; ``text_first``: the order of the sequence; ``in_place``: ``before`` may change.
        """
        if not in_place:  # gradients pass through
            keys, values = (self._joined(old, x, text_first) for old, x in zip(before, new))
            return keys, values
        text = new[0].shape[2] - self.index.shape[1]
        if before[0].shape[2] != text + self.tokens:
            before = [self._with_text(old, text, text_first) for old in before]
        (keys, values), (k, v) = before, new
        self._writer(k, v)(keys, values, k, v, self.index, text_first=text_first)
        return keys, values

    def _writer(self, k: Tensor, v: Tensor) -> WriteCall:
        """What writes keys and values like these, chosen once for a size."""
        if torch.compiler.is_compiling() or k.shape != v.shape:
            return self.copied
        size = (k.shape[1], k.shape[3])
        if size not in self._writers:
            self._writers[size] = choose(k, plain=self.copied).call
        return self._writers[size]

    def _parts(self, x: Tensor, text_first: bool) -> tuple[Tensor, Tensor]:
        """The text [rows, A, L, D] and the image [rows, A, S, D] of new keys or values."""
        computed = self.index.shape[1]
        text = x.shape[2] - computed
        image = x.narrow(2, text if text_first else 0, computed)
        return x.narrow(2, 0 if text_first else computed, text), image

    def _joined(self, before: Tensor, x: Tensor, text_first: bool) -> Tensor:
        """Keys or values of all tokens in a tensor of their own."""
        words, image = self._parts(x, text_first)
        old = before.narrow(2, before.shape[2] - self.tokens if text_first else 0, self.tokens)
        parts = [words, old.index_put(self.pick(x.shape[1], 0), image)]
        return torch.cat(parts if text_first else parts[::-1], 2)

    def copied(
        self,
        keys: Tensor,
        values: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        *,
        text_first: bool,
    ) -> None:
        """``kernels.tokens.write`` for the index of these places, by copies of torch."""
        for buffer, x in ((keys, k), (values, v)):
            words, image = self._parts(x, text_first)
            text = words.shape[2]
            buffer.index_put_(self.pick(x.shape[1], text if text_first else 0), image)
            if text:
                buffer.narrow(2, 0 if text_first else self.tokens, text).copy_(words)

    def _with_text(self, before: Tensor, text: int, text_first: bool) -> Tensor:
        """Room for another number of text tokens; those of the image are in place."""
        rows, heads, length, size = before.shape
        new = before.new_empty((rows, heads, text + self.tokens, size))
        here, there = (length - self.tokens, text) if text_first else (0, 0)
        new.narrow(2, there, self.tokens).copy_(before.narrow(2, here, self.tokens))
        return new
