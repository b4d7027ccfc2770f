"""How well the text that a prompt asks for can be read in the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import BaseReward, Facts
from diffalign.rewards.checkpoint import Foreign
from diffalign.rewards.toys import bytes_of

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements from one text to the other."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (char != other))
    return row[-1]


def target_of(prompt: str) -> str:
    """The first text in double quotes, lower case and without spaces.

    Raises: ValueError where there is none.
    """
    match = QUOTED.search(prompt)
    text = _plain(match[1] or match[2] or "") if match else ""
    if not text:
        raise ValueError(
            f"ocr: the prompt must hold the wanted text in double quotes, like a sign that says "
            f'"open"; got {prompt!r}.'
        )
    return text


def _plain(text: str) -> str:
    return "".join(text.lower().split())


class OCRText(BaseReward):
    """Whether the text in the prompt's double quotes can be read: 1 where it can, less with each
    wrong letter.

    1 - d / length, d the number of letters to insert, delete or replace, 0 where the text stands
    inside what was read; spaces and case do not count. ``ocr``: any function of an image [H, W, 3]
    of bytes that returns the text; None for ``rapidocr``, whose models come in its package (extra
    ``ocr``). A black box without gradient.
    Source: the reward of Flow-GRPO, Liu et al. 2025, arXiv:2505.05470. Cost: about two
    seconds of one core for an image of 320 x 120.
    """

    name = "ocr"
    facts = Facts(
        "Apache-2.0",
        "the rapidocr package",
        "32 MB of files",
        "on the CPU",
        "written text; selection only",
    )

    def __init__(self, ocr: Callable[[Foreign], str] | None = None) -> None:
        self.ocr = rapid() if ocr is None else ocr

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        targets = [target_of(prompt) for prompt in prompts]
        scores = []
        for pixels, target in zip(bytes_of(images), targets):
            text = _plain(self.ocr(pixels.numpy()))
            wrong = 0 if target in text else min(distance(text, target), len(target))
            scores.append(1 - wrong / len(target))
        return torch.tensor(scores, device=images.device)


def rapid() -> Callable[[Foreign], str]:
    """``rapidocr`` as a function of an image. Raises: ValueError where it is not installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError(
            "ocr: rapidocr is not installed; pip install 'diffalign[ocr]', or pass ocr= a function "
            "of an image that returns its text."
        ) from error
    engine = RapidOCR(params={"Global.log_level": "critical"})

    def read(pixels: Foreign) -> str:
        lines = engine(pixels[..., ::-1]).txts  # it reads blue first
        return " ".join(lines or ())

    return read
