"""Pictures of which everybody knows what they show: a photograph of a cat, and plain colours.

A scorer of photographs that gets one of them wrong is half loaded, or run in a number format that
it does not bear. NOTICE beside this file says where the photograph comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING

from diffalign.eval.benchmarks import Item
from diffalign.tasks.geneval.prompts import parse_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.eval.scorers.base import Outcome

RIGHT, WRONG = "a cat", "a bicycle"
"""What the photograph shows, and what it does not."""
PLAIN = {"red": (0.9, 0.05, 0.05), "green": (0.05, 0.6, 0.1), "blue": (0.05, 0.1, 0.9)}
"""Colours that nobody calls by another name."""
Box = tuple[float, float, float, float]
NEAR: Box = (0.35, 0.40, 0.70, 0.85)
FAR: Box = (0.92, 0.00, 1.00, 0.30)
"""(x1, y1, x2, y2) as shares of the photograph: the cat's nose, and the room behind it."""


def cat() -> Tensor:
    """The photograph [3, 300, 451] in [0, 1]: the head of a cat that fills it."""
    import numpy as np
    import torch
    from PIL import Image

    data = (files("diffalign.eval.scorers") / "cat.jpg").read_bytes()
    with Image.open(BytesIO(data)) as file:
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def plain(colour: tuple[float, float, float], side: int = 256) -> Tensor:
    """A picture [3, side, side] of one colour."""
    import torch

    return torch.tensor(colour)[:, None, None].expand(3, side, side).clone()


def verdicts(score: Callable[[Sequence[Tensor], Item], list[Outcome]]) -> str | None:
    """What is wrong with GenEval's verdicts on the photograph, None if nothing is."""
    for thing, expected in ((RIGHT, 1.0), (WRONG, 0.0)):
        prompt = f"a photo of {thing}"
        item = Item(0, prompt, "single_object", "", dict(parse_prompt(prompt) or {}))
        (outcome,) = score([cat()], item)
        if outcome.score != expected:
            verdict = "wrong" if expected else "right"
            return f"it calls the photograph of {RIGHT} {verdict} for {prompt!r}"
    return None


def preference(name: str, ask: Callable[[Tensor, str], float]) -> str | None:
    """What is wrong with the answers of one that rates a picture and a phrase."""
    pairs = [(plain(rgb), f"a {colour} picture") for colour, rgb in PLAIN.items()]
    wrong = [*(text for _, text in pairs[1:]), pairs[0][1]]
    for (picture, right), other in zip([*pairs, (cat(), RIGHT)], [*wrong, WRONG]):
        if ask(picture, right) <= ask(picture, other):
            return f"{name} finds that {right} looks more like {other}"
    return None


def nearness(depth: Sequence[Sequence[float]]) -> str | None:
    """What is wrong with a map of inverse depth of the photograph."""
    near, far = (_mean(depth, box) for box in (NEAR, FAR))
    if not near > far:
        return f"the depth model sees the cat's nose ({near:.2f}) behind the room ({far:.2f})"
    return None


def _mean(rows: Sequence[Sequence[float]], box: Box) -> float:
    height, width = len(rows), len(rows[0])
    x1, x2 = (round(share * width) for share in box[::2])
    y1, y2 = (round(share * height) for share in box[1::2])
    values = [value for row in rows[y1:y2] for value in row[x1:x2]]
    return sum(values) / len(values)
