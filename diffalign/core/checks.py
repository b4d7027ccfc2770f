"""Argument checks that every technique shares: each error names the argument, what was expected and
what came."""

from __future__ import annotations

import math
from collections.abc import Collection


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


def check_choice(owner: str, name: str, value: object, choices: Collection[str]) -> None:
    """``value`` must be one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{owner}({name}=...) must be one of {', '.join(sorted(choices))}; got {value!r}."
        )
