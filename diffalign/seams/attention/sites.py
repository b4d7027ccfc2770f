"""Where text enters attention: the layers of each family, and what one denoiser call looks like to
them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from diffalign.core import UnsupportedModel
from diffalign.families.family import Family
from diffalign.seams.attention.base import Site


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention module that sees text.

    ``call``: which of its scaled-dot-product calls has the text keys, counted from 0.
    """

    name: str
    denoiser: str
    module: nn.Module
    kind: Literal["cross", "joint"]
    text: Literal["first", "last"]
    call: int = 0

    @property
    def site(self) -> Site:
        """The layer without the facts of a call, as ``selects`` sees it."""
        return Site(self.name, self.kind)


@dataclass(frozen=True, slots=True)
class Frame:
    """One denoiser call as its layers see it.

    ``active``: techniques that act now, outermost first. ``conditioned``: per row. ``text``: tokens
    of the prompt; ``negative``: tokens of NAG's negative text behind them, 0 for none. ``twins``,
    ``spans``: as in ``Site``.
    """

    denoiser: str
    active: tuple[Any, ...]
    conditioned: tuple[bool, ...]
    text: int
    negative: int = 0
    twins: tuple[tuple[int, int], ...] = ()
    spans: tuple[tuple[slice, slice], ...] | None = None


def layers_of(family: Family, name: str, denoiser: nn.Module) -> Iterator[Layer]:
    """The layers of one denoiser that see text.

    Raises ``UnsupportedModel`` for one that the family does not know.
    """
    known = family.attention
    if known is None:
        return
    for path, module in denoiser.named_modules():
        if not hasattr(module, "processor"):
            continue
        if re.fullmatch(known.pattern, path):
            if isinstance(getattr(module, "norm_cross", None), nn.GroupNorm):
                raise UnsupportedModel(
                    f"{path} normalises over its text tokens (GroupNorm), so texts cannot be "
                    "added to them."
                )
            image_keys = (
                known.kind == "cross" and getattr(module, "add_k_proj", None) is not None
            )  # Wan attends to its image first
            yield Layer(path, name, module, known.kind, known.text, 1 if image_keys else 0)
        elif known.kind == "cross" and getattr(module, "is_cross_attention", False):
            raise UnsupportedModel(
                f"{path} ({type(module).__name__}) attends to the text but is not a layer that "
                f"diffalign knows in {family.name}."
            )


def spans_of(
    family: Family, denoiser: Any, kwargs: dict[str, Any]
) -> tuple[tuple[slice, slice], ...] | None:
    """Positions of (text, image) for each row, in the families where they differ between rows; None
    elsewhere."""
    if family.attention is None or family.attention.row_parts is None:
        return None
    rows = family.attention.row_parts(denoiser, kwargs)
    return tuple((parts["prompt"], parts["image"]) for parts in rows)


def text_length(family: Family, kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt, padding included (of the longest row where rows differ)."""
    argument = family.text[0]
    value = kwargs[argument.name]
    if isinstance(value, list):
        return max(len(item) for item in value)
    if not isinstance(value, Tensor):
        raise UnsupportedModel(
            f"Expected a tensor of text embeddings as {argument.name}; got {type(value).__name__}."
        )
    return int(value.shape[argument.axis])


def site_of(layer: Layer, frame: Frame, q: Tensor, k: Tensor) -> Site:
    """The layer in this call.

    Raises ``UnsupportedModel`` when the sequences are not what the family says.
    """
    total, keys, queries = frame.text + frame.negative, int(k.shape[-2]), int(q.shape[-2])
    facts: dict[str, Any] = {"conditioned": frame.conditioned, "twins": frame.twins}
    if len(frame.conditioned) != q.shape[0]:
        raise UnsupportedModel(
            f"Expected {len(frame.conditioned)} rows at {layer.name!r}; got {q.shape[0]}."
        )
    if layer.kind == "cross":
        if keys != total:
            raise UnsupportedModel(f"Expected {total} text keys at {layer.name!r}; got {keys}.")
        negative = slice(frame.text, total) if frame.negative else None
        return Site(
            layer.name, "cross", slice(0, frame.text), queries, slice(0, queries), negative, **facts
        )
    if keys != queries:
        raise UnsupportedModel(
            f"Expected as many keys as queries at {layer.name!r}; got {keys} and {queries}."
        )
    if frame.spans is not None:
        first = frame.spans[0]
        same = all(span == first for span in frame.spans)
        tokens = first[1].stop - first[1].start
        text, image = first if same else (None, None)
        return Site(layer.name, "joint", text, tokens, image, spans=frame.spans, **facts)
    if keys <= total:
        raise UnsupportedModel(
            f"Expected more than {total} tokens (text and image) at {layer.name!r}; got {keys}."
        )
    tokens = keys - total
    start = 0 if layer.text == "first" else tokens
    text, end = slice(start, start + frame.text), start + total
    image = slice(total, keys) if layer.text == "first" else slice(0, tokens)
    negative = slice(text.stop, end) if frame.negative else None
    return Site(layer.name, "joint", text, tokens, image, negative, **facts)
