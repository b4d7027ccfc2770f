"""What a field of the page may hold; everything else is refused in a sentence."""

from __future__ import annotations

import html
import math

import gradio as gr

PROMPT = 500
"""Letters of a prompt."""
TEXT = 300
"""Letters of an option or of a technique in the command line's form."""
STEPS = 100
SCALE = 30.0
SEED = 2**53 - 1
"""The largest whole number that a browser holds exactly."""


def refusal(message: object) -> gr.Error:
    """An error for the page, as plain text; it leaves no traceback in the terminal."""
    text = " ".join(str(message).split())
    return gr.Error(html.escape(text[:600]), print_exception=False)


def prompt_of(text: str | None, name: str = "prompt") -> str:
    """The text of a prompt. Raises: ``gr.Error`` where it is empty or too long."""
    text = (text or "").strip()
    if not text:
        raise refusal(f"The {name} is empty. Say what to draw, e.g. 'a photo of three dogs'.")
    return short(text, f"The {name}", PROMPT)


def short(text: object, name: str, most: int = TEXT) -> str:
    """``text`` where it is one and not too long. Raises: ``gr.Error``."""
    if not isinstance(text, str):
        raise refusal(f"{name} must be a text; got {str(text)[:40]!r}.")
    if len(text) > most:
        raise refusal(f"{name} may have {most} letters; got {len(text)}.")
    return text


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number of the range. Raises: ``gr.Error``."""
    usable = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not usable or int(value) != value:  # type: ignore[call-overload]
        raise refusal(f"{name} must be a whole number from {low} to {high}; got {value}.")
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(value: object, name: str, low: float, high: float) -> float:
    """A number of the range. Raises: ``gr.Error``."""
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        raise refusal(f"{name} must be a number from {low:g} to {high:g}; got {value}.")
    return float(value)
