"""Attention layers of a denoiser, those that see text and those that see the image alone, and what
one call looks like to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from diffalign.core import AttentionTechnique, Site, UnsupportedModel
from diffalign.core.attention import Parts, matches
from diffalign.core.errors import nearest
from diffalign.families.family import Family
from diffalign.families.layout import Grid
from diffalign.seams.attention.call import CallView
from diffalign.seams.swap import unwrapped


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention module."""

    # dotted name in the model, without any wrapper
    name: str
    # attribute of the pipeline that holds the denoiser
    denoiser: str
    module: nn.Module
    kind: Literal["self", "cross", "joint"]
    # whether the text stands before or behind the image in a joint sequence, None without text
    text: Literal["first", "last"] | None
    # which of its scaled-dot-product calls has the text keys, counted from 0
    call: int = 0

    @property
    def site(self) -> Site:
        """The layer without the facts of a call, as ``selects`` sees it."""
        return Site(self.name, self.kind)

    def chain(
        self, techniques: Sequence[AttentionTechnique], change: AttentionTechnique | None = None
    ) -> list[AttentionTechnique]:
        """Those of ``techniques`` that are called here, and the ``change`` of a pass, outermost
        first."""
        called = [t for t in techniques if self.text is not None]
        called = [t for t in called if t.everywhere or t.selects(self.site)]
        if change is not None and change.selects(self.site):
            called = sorted([*called, change], key=lambda t: t.order)
        return called


def refusal(family: Family) -> str | None:
    """Why no attention technique can act on the family's models, None when one can."""
    if not family.text:
        return f"{family.name} has no text in its attention layers"
    if family.attention is None:
        return f"the attention layers of {family.name} are not known"
    return None


def layers_of(family: Family, name: str, denoiser: nn.Module) -> Iterator[Layer]:
    """The layers of one denoiser that see text.

    Raises ``UnsupportedModel`` for one that the family does not know.
    """
    known = family.attention
    if known is None:
        return
    for path, module in unwrapped(denoiser).named_modules():
        if not hasattr(module, "processor"):
            continue
        if re.fullmatch(known.pattern, path):
            if isinstance(getattr(module, "norm_cross", None), nn.GroupNorm):
                raise UnsupportedModel(
                    f"{path} normalises over its text tokens (GroupNorm), so texts cannot be "
                    "added to them."
                )
            # Wan attends to its image first
            image_keys = known.kind == "cross" and getattr(module, "add_k_proj", None) is not None
            yield Layer(path, name, module, known.kind, known.text, 1 if image_keys else 0)
        elif known.kind == "cross" and getattr(module, "is_cross_attention", False):
            raise UnsupportedModel(
                f"{path} ({type(module).__name__}) attends to the text but is not a layer that "
                f"diffalign knows in {family.name}."
            )


def map_layers(family: Family, name: str, denoiser: nn.Module) -> Iterator[Layer]:
    """The layers of one denoiser in which image tokens attend to one another, as they are
    registered."""
    known = family.attention
    joint = layers_of(family, name, denoiser) if known and known.kind == "joint" else ()
    by_name = {layer.name: layer for layer in joint}
    for path, module in unwrapped(denoiser).named_modules():
        if path in by_name:
            yield by_name[path]
        elif (
            family.self_attention is not None
            and hasattr(module, "processor")
            and re.fullmatch(family.self_attention, path)
        ):
            yield Layer(path, name, module, "self", None)


def select_maps(
    owner: str, family: Family, denoiser: nn.Module, layers: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of layers from ``map_layers``: those that fit one of the shell patterns ``layers``.

    None picks those of a U-Net's middle, or of the middle one of a transformer's blocks. Raises
    ``UnsupportedModel`` when nothing is picked.
    """
    listed = [layer.name for layer in map_layers(family, "", denoiser)]
    if not listed:
        raise UnsupportedModel(
            f"{owner} changes how image tokens attend to one another, and diffalign knows no such "
            f"layer in {family.name}. Use S2Guidance."
        )
    if layers is not None:
        picked = tuple(name for name in listed if matches(tuple(layers), name))
        if not picked:
            raise UnsupportedModel(
                f"{owner}(layers=...): no layer of {family.name} fits {', '.join(layers)}. "
                f"Nearest: {nearest(' '.join(layers), listed)}."
            )
        return picked
    middle = tuple(name for name in listed if name.startswith("mid_block."))
    if middle:
        return middle
    block = listed[len(listed) // 2].rpartition(".")[0]
    return tuple(name for name in listed if name.rpartition(".")[0] == block)


def row_parts(family: Family, denoiser: Any, arguments: Mapping[str, Any]) -> tuple[Parts, ...]:
    """Positions in each row, in the families where they differ between rows; empty elsewhere."""
    if family.attention is None or family.attention.row_parts is None:
        return ()
    return family.attention.row_parts(unwrapped(denoiser), arguments)


def text_length(family: Family, arguments: Mapping[str, Any]) -> int:
    """Tokens of the prompt, padding included (of the longest row where rows differ); 0 without
    text."""
    if not family.text:
        return 0
    argument = family.text[0]
    value = arguments[argument.name]
    if isinstance(value, list):
        return max(len(item) for item in value)
    if not isinstance(value, Tensor):
        raise UnsupportedModel(
            f"Expected a tensor of text embeddings as {argument.name}; got {type(value).__name__}."
        )
    return int(value.shape[argument.axis])


def site_of(layer: Layer, view: CallView, q: Tensor, k: Tensor) -> Site:
    """The layer in this call.

    Raises ``UnsupportedModel`` when the sequences are not what the family says.
    """
    keys, queries = int(k.shape[-2]), int(q.shape[-2])
    if len(view.conditioned) != q.shape[0]:
        raise UnsupportedModel(
            f"Expected {len(view.conditioned)} rows at {layer.name!r}; got {q.shape[0]}."
        )
    if layer.kind != "cross" and keys != queries and view.passage is None:
        raise UnsupportedModel(
            f"Expected as many keys as queries at {layer.name!r}; got {keys} and {queries}."
        )
    rows = view.row_parts if layer.kind == "joint" else ()
    key_parts: Parts = {}
    if rows:
        alike = all(parts == rows[0] for parts in rows)
        parts, image = rows[0] if alike else {}, rows[0]["image"]
        rows = () if alike else rows
    else:
        parts = _parts(layer, view, keys, queries)
        image = parts["image"]
        if layer.kind != "cross" and keys != queries:
            key_parts = _parts(layer, view, keys, keys)
    tokens = image.stop - image.start
    grid = None if view.grid is None else grid_at(view.grid, tokens, layer)
    texts = (view.conditioned, view.copies, view.negatives)
    return Site(layer.name, layer.kind, parts, key_parts, rows, tokens, *texts, grid)


def grid_at(grid: Grid, tokens: int, layer: Layer) -> Grid:
    """The image in tokens of a layer that has ``tokens`` of them: a U-Net's deeper layers see every
    second, fourth or eighth row and column.

    Raises ``UnsupportedModel`` where they do not fit.
    """
    frames, height, width = grid
    while frames * height * width > tokens and max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
    size = frames * height * width
    if size > tokens or (layer.kind == "self" and size != tokens):
        raise UnsupportedModel(
            f"Expected {frames} x {height} x {width} image tokens at {layer.name!r}; got {tokens}."
        )
    return frames, height, width


def _parts(layer: Layer, view: CallView, keys: int, queries: int) -> Parts:
    """Positions by name, the same in every row."""
    if layer.kind == "self":
        return {"image": slice(0, queries)}
    total = view.prompt + sum(view.added.values())
    if layer.kind == "cross":
        if keys != total:
            raise UnsupportedModel(f"Expected {total} text keys at {layer.name!r}; got {keys}.")
        return {**_texts(view, 0), "image": slice(0, queries)}
    if queries <= total:
        raise UnsupportedModel(
            f"Expected more than {total} tokens (text and image) at {layer.name!r}; got {queries}."
        )
    tokens = queries - total
    if layer.text == "first":
        return {**_texts(view, 0), "image": slice(total, queries)}
    return {**_texts(view, tokens), "image": slice(0, tokens)}


def _texts(view: CallView, start: int) -> dict[str, slice]:
    """The prompt from ``start`` on, and behind it what techniques added."""
    places = {}
    for name, length in {"prompt": view.prompt, **view.added}.items():
        places[name] = slice(start, start + length)
        start += length
    return places
