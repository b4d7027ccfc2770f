"""Argument checks that every technique shares: each error names the argument, what was expected and
what came."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def check_scale(owner: str, value: float | None, name: str = "scale") -> None:
    """``value`` must be None or a finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{owner}({name}=...) must be a finite number, or None for the pipeline's own value; "
            f"got {value!r}."
        )


def check_range(owner: str, name: str, value: float, lo: float, hi: float) -> None:
    """``value`` must be a number in [lo, hi]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lo <= value <= hi:
        raise ValueError(
            f"{owner}({name}=...) must be a number in [{lo:g}, {hi:g}]; got {value!r}."
        )


def check_choice(owner: str, name: str, value: Any, choices: Collection[str]) -> None:
    """``value`` must be one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{owner}({name}=...) must be one of {', '.join(sorted(choices))}; got {value!r}."
        )


def check_shape(x: Tensor, letters: str, **known: int) -> dict[str, int]:
    """Match ``x.shape`` with e.g.

    ``"B 3 H W"``; digits are fixed sizes, ``known`` binds letters. Returns letter -> size.
    """
    parts = letters.split()
    sizes = dict(known)
    good = x.ndim == len(parts)
    for part, size in zip(parts, x.shape):
        good = good and size == (int(part) if part.isdigit() else sizes.setdefault(part, size))
    if not good:
        raise ValueError(
            f"Expected a tensor of shape [{', '.join(parts)}] with {known or 'any sizes'}; got "
            f"{list(x.shape)}."
        )
    return sizes


def rowwise(x: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, n]`` in float32: every axis but the rows flattened."""
    return x.flatten(1).float()
