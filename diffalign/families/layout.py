"""How the tokens of an image lie in a denoiser's sequence: frames, height and width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Grid = tuple[int, int, int]
"""Frames, height and width of an image in tokens."""
Table = Any
"""Rotary embeddings of a sequence of tokens [N, ...]."""


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where a denoiser takes image tokens in and puts them out, so that some can be left out.

    The last three are regular expressions of the names of linear layers, by the tokens that they
    treat: what a step costs is counted from them.
    """

    # module whose output is the image's tokens [rows, N, C]
    embed: str
    # module whose output is the prediction in tokens [rows, N, p]
    out: str
    # linear layers that treat image tokens, text tokens, and both in one sequence
    image: str
    text: str
    both: str = "(?!)"
    # denoiser arguments [rows, L + N] over text and image tokens
    masks: tuple[str, ...] = ()
    # argument of attention layers -> (its value, a function that picks the image tokens of a table
    # that ends with theirs) -> the value for those tokens
    rotary: Mapping[str, Callable[[Any, Callable[[Table], Table]], Any]] = field(
        default_factory=dict
    )


def each_table(tables: tuple[Table, ...], pick: Callable[[Table], Table]) -> tuple[Table, ...]:
    """For ``TokenPlaces.rotary``: cosines and sines over text and image."""
    return tuple(map(pick, tables))


def first_table(tables: tuple[Table, ...], pick: Callable[[Table], Table]) -> tuple[Table, ...]:
    """For ``TokenPlaces.rotary``: a table of the image, then that of the text."""
    return pick(tables[0]), *tables[1:]


def latent_grid(denoiser: Any, call: Mapping[str, Any]) -> Grid:
    """Latents [B, C, H, W] or [B, C, T, H, W], the first argument, in the patches of the config.

    A U-Net has none: its finest layers see every position.
    """
    shape = next(iter(call.values())).shape
    depth, high, wide = patches(denoiser)
    frames = shape[2] // depth if len(shape) == 5 else 1
    return frames, shape[-2] // high, shape[-1] // wide


def patches(denoiser: Any) -> Grid:
    """Frames, height and width of one patch, in positions of the latent."""
    size = denoiser.config.get("patch_size") or 1
    if not isinstance(size, int):
        depth, high, wide = size
        return depth, high, wide
    return denoiser.config.get("patch_size_t") or 1, size, size


def position_grid(denoiser: Any, call: Mapping[str, Any]) -> Grid:
    """Packed latents whose ``img_ids`` [N, 3] hold a row and a column; reference images have
    another first number."""
    positions = call["img_ids"]
    positions = positions[0] if positions.ndim == 3 else positions
    made = positions[positions[:, 0] == positions[0, 0]]
    row, column = made[:, 1:].max(0).values.tolist()
    return 1, int(row) + 1, int(column) + 1
