"""The words of a text encoder, and texts whose token embeddings are changed while it reads them.

An encoder looks its tokens up in one layer. For the length of a block that layer's answer is
changed at chosen tokens; everything behind it runs as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core import UnsupportedModel
from diffalign.core.types import Pipeline
from diffalign.core.words import Shift
from diffalign.seams.swap import intercepted, original_class


@dataclass(frozen=True)
class TextTower:
    """The ``Words`` of one text encoder."""

    # token ids [R, L] -> embeddings [R, L, D]
    layer: nn.Module
    # token ids [R, L] with marks and padding -> features [R, F]
    encode: Callable[[Tensor], Tensor]
    # text -> token ids with marks, without padding; cut to the encoder's length
    tokenize: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    # tokens of a row, marks included
    length: int
    padding: int

    @property
    def table(self) -> Tensor:
        weight: Any = self.layer.weight
        table: Tensor = weight.detach()
        return table

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Marks before and behind every text."""
        empty = self.tokenize("")
        return (empty[:-1], empty[-1:])

    @property
    def room(self) -> int:
        return self.length - sum(map(len, self._ends))

    @property
    def marks(self) -> frozenset[int]:
        return frozenset((*self._ends[0], *self._ends[1], self.padding))

    def tokens(self, text: str) -> list[int]:
        first, last = self._ends
        row = self.tokenize(text)
        return row[len(first) : len(row) - len(last)]

    def text(self, tokens: Sequence[int]) -> str:
        return self.decode(list(tokens)).strip()

    def features(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Features [R, F]. Raises: ValueError for more tokens than fit."""
        count = tokens.shape[1]
        if count > self.room:
            raise ValueError(f"A text has room for {self.room} tokens; got {count}.")
        first, last = self._ends
        rest = [self.padding] * (self.room - count)
        marks = [
            torch.tensor(part, device=tokens.device).expand(len(tokens), -1).long()
            for part in (first, [*last, *rest])
        ]
        ids = torch.cat([marks[0], tokens, marks[1]], 1).to(self.table.device)
        if embeddings is None:
            return self.encode(ids)

        def replaced(original: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
            rows: Tensor = original(*args, **kwargs)
            end = len(first) + count
            return torch.cat([rows[:, : len(first)], embeddings.to(rows), rows[:, end:]], 1)

        with intercepted({self.layer: ("forward", replaced)}):
            return self.encode(ids)


def tower_of(pipe: Pipeline) -> TextTower:
    """The words of a pipeline's first text encoder; its features are the pooled text.

    Raises: ``UnsupportedModel`` where there is none that pools its text as CLIP's does.
    """
    encoder, tokenizer = (getattr(pipe, name, None) for name in ("text_encoder", "tokenizer"))
    if encoder is None or tokenizer is None:
        raise UnsupportedModel(f"{original_class(pipe).__name__} has no text encoder to search in.")

    def encode(ids: Tensor) -> Tensor:
        answer = encoder(ids)
        pooled = getattr(answer, "text_embeds", None)
        pooled = getattr(answer, "pooler_output", None) if pooled is None else pooled
        if pooled is None:
            raise UnsupportedModel(
                f"{type(encoder).__name__} does not pool its text; use the words of a CLIP reward."
            )
        features: Tensor = pooled
        return features

    def tokenize(text: str) -> list[int]:
        row: list[int] = tokenizer(text, truncation=True)["input_ids"]
        return row

    padding = tokenizer.pad_token_id
    length = tokenizer.model_max_length
    return TextTower(
        encoder.get_input_embeddings(), encode, tokenize, tokenizer.decode, length, padding
    )


def check_shift(pipe: Pipeline, prompts: object, shift: Shift) -> None:
    """Raise ValueError where no prompt of a call has the tokens whose embeddings are to change."""
    tower, tokens = tower_of(pipe), list(shift.tokens)
    texts = [prompts] if isinstance(prompts, str) else prompts
    assert isinstance(texts, list | tuple | None)
    for text in texts or ():
        row = tower.tokens(text)
        if any(row[i : i + len(tokens)] == tokens for i in range(len(row))):
            return
    raise ValueError(f"No prompt of {texts} has the tokens {tokens} in a row.")


@contextmanager
def shifted(pipe: Pipeline, shift: Shift) -> Iterator[None]:
    """Within the block the pipeline's first text encoder reads these tokens with ``shift`` added to
    their embeddings, wherever a text has them in a row.

    Raises: ``UnsupportedModel`` where there is no text encoder.
    """
    tokens = torch.tensor(shift.tokens)

    def added(original: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        rows: Tensor = original(*args, **kwargs)
        ids: Tensor = args[0] if args else kwargs["input"]
        windows = ids.cpu().unfold(1, len(tokens), 1)
        for row, place in (windows == tokens).all(-1).nonzero().tolist():
            behind = rows.shape[1] - place - len(tokens)
            change = F.pad(shift.values.to(rows), (0, 0, place, behind))
            rows = rows.index_add(0, torch.tensor([row], device=rows.device), change[None])
        return rows

    with intercepted({tower_of(pipe).layer: ("forward", added)}):
        yield


def open_clip_tower(model: Any, tokenizer: Any) -> TextTower:
    """The words of an open_clip model; its features are those of ``encode_text``."""
    owner = model if hasattr(model, "token_embedding") else model.text
    return clip_tower(owner.token_embedding, model.encode_text, tokenizer)


def clip_tower(layer: nn.Module, encode: Callable[[Tensor], Tensor], tokenizer: Any) -> TextTower:
    """The words of a text encoder whose tokenizer is one of open_clip's."""
    _, end, *rest = tokenizer([""])[0].tolist()

    def tokenize(text: str) -> list[int]:
        row: list[int] = tokenizer([text])[0].tolist()
        return row[: row.index(end) + 1] if end in row else row

    decode = getattr(tokenizer, "tokenizer", tokenizer).decode
    length, padding = 2 + len(rest), rest[-1] if rest else end
    return TextTower(layer, encode, tokenize, decode, length, padding)
