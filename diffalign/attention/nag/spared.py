"""What NAG need not compute: a negative text that other rows have already, negative tokens that
nobody reads, and an image stream that is the same in two rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.families import Family
from diffalign.seams.attention.call import Handlers, RunningCall
from diffalign.seams.attention.intercept import put, take
from diffalign.seams.attention.sites import layers_of
from diffalign.seams.swap import unwrapped

if TYPE_CHECKING:
    from diffalign.attention.nag.rows import TextRows
    from diffalign.seams.denoiser.call import DenoiserCall

NEGATIVE = "negative"
"""Name of the negative text's tokens in ``Site.parts``."""

# modules of an attention layer that treat its text tokens one by one
CROSS = ("to_k", "to_v", "to_kv")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", "to_add_out")
Pairs = tuple[tuple[int, int], ...]


class Borrowed:
    """Negative texts that rows of the unconditional branch have as their own.

    Keys and values of cross-attention depend on the text alone, so there they serve both.
    """

    def __init__(self, family: Family, rows: TextRows) -> None:
        self.rows, self.argument = rows, family.text[0]
        self.possible = family.attention is not None and family.attention.kind == "cross"
        # the text that was compared and what it was then; kept, so that its memory is not reused
        self._text: tuple[Tensor, Any] | None = None
        self._equal = False

    def pairs(
        self, call: DenoiserCall, arguments: Mapping[str, Any], images: Sequence[int]
    ) -> Pairs:
        """(row, the row of the same image whose own text is its negative text) for every row that
        carries the prompt; empty where any has none.

        Cost: the first call compares the texts, which waits for the device; later ones do not.
        """
        places = {images[i]: i for i, flag in enumerate(call.conditioned) if not flag}
        guided = [i for i, flag in enumerate(call.conditioned) if flag]
        if not self.possible or not all(images[i] in places for i in guided):
            return ()
        pairs = tuple((i, places[images[i]]) for i in guided)
        return pairs if self._same([row for _, row in pairs], arguments, images) else ()

    def _same(
        self, rows: Sequence[int], arguments: Mapping[str, Any], images: Sequence[int]
    ) -> bool:
        text = arguments[self.argument.name]
        if text.is_inference():  # whether somebody has changed it cannot be known
            return False
        state = (text.data_ptr(), text.shape, text.stride(), text._version, tuple(rows))
        if self._text is None:
            self._text, self._equal = (text, state), self._compare(rows, arguments, images)
        return self._equal and self._text[1] == state

    def _compare(
        self, rows: Sequence[int], arguments: Mapping[str, Any], images: Sequence[int]
    ) -> bool:
        name, mask, pictures = self.argument.name, self.argument.mask, [images[i] for i in rows]
        text = take(arguments[name], rows)
        negative = self.rows(name, pictures, text)
        if text.shape != negative.shape or not torch.equal(text, negative):
            return False
        opened = None if mask is None else arguments.get(mask)
        if mask is None or (opened is None and mask not in self.rows.text):
            return True
        if opened is None or opened.ndim != 2:
            return False
        return torch.equal(take(opened, rows), self.rows.mask(mask, pictures, opened, negative))


def handlers_of(
    running: RunningCall, family: Family, denoisers: Mapping[str, Any], *, one_image: bool
) -> Handlers:
    """Modules that leave out what nobody reads.

    ``one_image``: two rows share an image stream; else one row has both texts.
    """
    second = family.second_text
    assert second is not None
    handlers: Handlers = {}
    for name, denoiser in denoisers.items():
        model: nn.Module = unwrapped(denoiser)
        modules: list[nn.Module] = []
        if one_image:
            modules += _matching(model, second.image_modules)
        elif family.mode == "batched" and not second.in_rows(model):
            modules += _matching(model, second.tokens)
            for layer in layers_of(family, name, denoiser):
                names = CROSS if layer.kind == "cross" else JOINT
                parts = (getattr(layer.module, part, None) for part in names)
                modules += [part for part in parts if isinstance(part, nn.Module)]
        handler = _first_image if one_image else _read_tokens
        handlers |= {module: ("__call__", partial(handler, running)) for module in modules}
    return handlers


def _matching(model: nn.Module, pattern: str | None) -> list[nn.Module]:
    """Modules whose dotted names match a regular expression as a whole."""
    if pattern is None:
        return []
    return [module for path, module in model.named_modules() if re.fullmatch(pattern, path)]


def _read_tokens(
    running: RunningCall,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A module that treats tokens one by one, without the negative tokens of rows that do not carry
    the prompt; they come out as zeros."""
    view = running.view
    if view is None or NEGATIVE not in view.added or all(view.conditioned) or len(args) != 1:
        return original(*args, **kwargs)
    x, prompt, count = args[0], view.prompt, len(view.conditioned)
    length = prompt + view.added[NEGATIVE]
    if x.ndim != 3 or x.shape[:2] != (count, length):
        return original(*args, **kwargs)
    rows = [row for row, conditioned in enumerate(view.conditioned) if conditioned]
    pieces = (x[:, :prompt], take(x[:, prompt:], rows))
    output = original(torch.cat([piece.flatten(0, 1) for piece in pieces])[None], **kwargs)[0]
    texts, negatives = output.split([count * prompt, len(rows) * (length - prompt)])
    unread = output.new_zeros((count, length - prompt, output.shape[-1]))
    negative = put(unread, rows, negatives.unflatten(0, (len(rows), -1)))
    return torch.cat([texts.unflatten(0, (count, -1)), negative], 1)


def _first_image(
    running: RunningCall,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A module of an image stream that is the same in both rows of a pair, run on the first."""
    view = running.view
    if view is None or not view.copies or len(args) != 1:
        return original(*args, **kwargs)
    total = len(view.conditioned) - len(view.copies)
    output = original(args[0][:total], **kwargs)
    return torch.cat([output, take(output, [row for row, _ in view.copies])])
