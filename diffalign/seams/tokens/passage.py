"""One denoiser call that leaves tokens out, or that keeps what later calls need to do so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel
from diffalign.families.layout import TokenPlaces
from diffalign.seams.tokens.memory import Memory, Places, fresh

if TYPE_CHECKING:
    from diffalign.seams.attention.seats import Arguments
    from diffalign.seams.attention.sites import Layer


class Passage:
    """One denoiser call.

    ``index`` [rows, kept]: the image tokens of each row that it computes, None for all ``tokens``;
    ``memory``: what earlier calls of these rows left, needed where tokens are left out;
    ``remembers``: whether keys and values of this call stay; ``images``: which image each row
    belongs to.
    """

    def __init__(
        self,
        places: TokenPlaces,
        tokens: int,
        images: Sequence[int],
        index: Tensor | None,
        memory: Memory | None,
        remembers: bool,
    ) -> None:
        assert index is None or memory is not None
        self.places, self.tokens, self.images = places, tokens, images
        self.index, self.memory, self.remembers = index, memory, remembers
        self._places = None if index is None else Places(index, tokens)
        # whether the tensors of the memory may be written into
        self.in_place = False
        # layer -> keys and values of all tokens
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        # of all tokens [rows, N, p], None before the output layer has run
        self.prediction: Tensor | None = None
        # rotary tables as they came -> with the rows of these tokens
        self._tables: dict[int, tuple[Any, Any]] = {}

    @property
    def at_layers(self) -> bool:
        """Whether attention layers must know of it."""
        return self.index is not None or self.remembers

    def arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments for the tokens that it computes."""
        masks = [name for name in self.places.masks if arguments.get(name) is not None]
        if self.index is None or not masks:
            return arguments
        return arguments | {name: self._picked(arguments[name]) for name in masks}

    def _picked(self, mask: Tensor) -> Tensor:
        """A mask [rows, L + N] of the tokens that are computed."""
        assert self.index is not None
        text = mask.shape[1] - self.tokens
        return torch.cat([mask[:, :text], mask[:, text:].gather(1, self.index)], 1)

    def embed(self, output: Tensor) -> Tensor:
        """The embedded image tokens [rows, N, C] that are computed."""
        if output.ndim != 3 or output.shape[:2] != (len(self.images), self.tokens):
            raise UnsupportedModel(
                f"Expected [{len(self.images)}, {self.tokens}, ...] image tokens at "
                f"{self.places.embed!r}; got {list(output.shape)}."
            )
        if self.index is None:
            return output
        return output.gather(1, self.index[..., None].expand(-1, -1, output.shape[-1]))

    def put_out(self, output: Tensor) -> Tensor:
        """The prediction of all tokens [rows, N, p]: the last one of those that are left out."""
        if self.index is not None:
            assert self.memory is not None
            index = self.index[..., None].expand(-1, -1, output.shape[-1])
            output = self.memory.prediction.to(output.dtype).scatter(1, index, output)
        # copied: a compiled model may write its next prediction over this one
        self.prediction = output.clone()
        return output

    def layer_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an attention layer, with the rotary embeddings of these tokens."""
        if self.index is None:
            return kwargs
        changed = {
            name: pick(kwargs[name], self._rows_of)
            for name, pick in self.places.rotary.items()
            if kwargs.get(name) is not None
        }
        return kwargs | changed

    def _rows_of(self, table: Any) -> Any:
        """A rotary table [L + N, ...] with the rows of the text and of the tokens computed."""
        if id(table) not in self._tables:
            assert self.index is not None
            text = len(table) - self.tokens
            if len(set(self.images)) == 1:
                picked: Any = torch.cat([table[:text], table[text:][self.index[0]]])
            else:
                words = table[:text].expand(len(self.images), *table[:text].shape)
                picked = RowTable(torch.cat([words, table[text:][self.index]], 1))
            self._tables[id(table)] = (table, picked)  # kept: an id may be used again
        return self._tables[id(table)][1]

    def widened(self, layer: Layer, call: Arguments) -> Arguments:
        """A layer's attention call with the keys and values of all tokens."""
        if self.index is None:
            self.keys[layer.name], self.values[layer.name] = fresh(call.k), fresh(call.v)
            return call
        assert self.memory is not None
        assert self._places is not None
        text_first = layer.text == "first"
        if layer.name not in self.memory.keys:
            raise UnsupportedModel(f"{layer.name!r} did not run in the step before.")
        before = (self.memory.keys[layer.name], self.memory.values[layer.name])
        written = self._places.written(before, (call.k, call.v), text_first, self.in_place)
        self.keys[layer.name], self.values[layer.name] = written
        return replace(call, k=written[0], v=written[1], mask=self._mask(call, text_first))

    def _mask(self, call: Arguments, text_first: bool) -> Tensor | None:
        """The mask of a call for the keys of all tokens; image keys are masked alike."""
        mask, kept = call.mask, self.index.shape[1] if self.index is not None else 0
        if mask is None or mask.shape[-1] == 1:
            return mask
        text = mask.shape[-1] - kept
        words = mask.narrow(-1, 0 if text_first else kept, text)
        image = mask.narrow(-1, text if text_first else 0, 1)
        image = image.expand(*mask.shape[:-1], self.tokens)
        return torch.cat([words, image] if text_first else [image, words], -1)


class RowTable:
    """A rotary table that differs between rows [rows, L, ...], for code that reads one table [L,
    ...] of all rows: the axis that it adds for the rows is there already."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __getitem__(self, index: tuple[Any, ...]) -> Tensor:
        """``table[None, :, None]``: the first entry is the axis of the rows."""
        return self.table[(slice(None), *index[1:])]

    def unsqueeze(self, axis: int) -> Tensor:
        """``table.unsqueeze(1)`` [L, 1, ...], with the rows in front."""
        return self.table.unsqueeze(axis + 1)


Running = Callable[[], "Passage | None"]
"""The passage of the call that is running."""


def gathered(
    running: Running, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The patch embedding was called."""
    passage = running()
    output = original(*args, **kwargs)
    return output if passage is None else passage.embed(output)


def scattered(
    running: Running, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The output layer was called."""
    passage = running()
    output = original(*args, **kwargs)
    return output if passage is None else passage.put_out(output)
