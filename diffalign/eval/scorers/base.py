"""The contract of scorers, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from diffalign.core.errors import nearest
from diffalign.core.types import Json
from diffalign.eval.benchmarks import Item

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scorer says of one image."""

    # in [0, 1]; of a yes or no 1 or 0
    score: float
    # why it is not full, "" where nothing is to be said
    reason: str
    # what it saw: detections, probabilities; enough to form another score without the image
    measured: Json


class Scorer(Protocol):
    """Scores images of prompts."""

    name: str

    def facts(self) -> Json:
        """What defines its scores: models, revisions, thresholds, modes."""
        ...

    def knows(self, item: Item) -> bool:
        """Whether it can score images of this prompt."""
        ...

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """Outcomes of images [3, H, W] in [0, 1] of one prompt."""
        ...

    def canary(self) -> str | None:
        """Score images that are known to be right and wrong; what is broken, None if nothing."""
        ...


NAMES: dict[str, str] = {
    "emoji-judge": "diffalign.eval.scorers.emoji:emoji_judge",
    "emoji-judge-audit": "diffalign.eval.scorers.emoji:emoji_judge_audit",
    "emoji-judge-2": "diffalign.eval.scorers.emoji:emoji_judge_2",
    "emoji-judge-audit-2": "diffalign.eval.scorers.emoji:emoji_judge_audit_2",
    "mask2former": "diffalign.eval.scorers.geneval:mask2former",
    "mask2former-large": "diffalign.eval.scorers.geneval:mask2former_large",
    "compbench": "diffalign.eval.scorers.compbench:published",
    "compbench-fixed": "diffalign.eval.scorers.compbench:fixed",
    "blip-vqa": "diffalign.eval.scorers.compbench:questions",
}
"""Name -> the function that loads it for a device."""


def load_scorer(name: str, device: str = "cpu") -> Scorer:
    """The scorer of that name on a device.

    Raises: ValueError for an unknown name, and for models that cannot be loaded.
    """
    if name not in NAMES:
        raise ValueError(f"unknown scorer {name!r}; nearest: {nearest(name, NAMES)}.")
    module, _, function = NAMES[name].partition(":")
    scorer: Scorer = getattr(import_module(module), function)(device)
    return scorer
