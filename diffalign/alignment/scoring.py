"""Rewards under control: checked, in batches that fit, and the best images that they chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from diffalign.core.budget import Meter
from diffalign.core.reward import Reward
from diffalign.core.search import Candidate

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
KEPT = 8
"""Images that a contact sheet of the best ones shows."""


class BadScore(ValueError):
    """A reward gave a score that is not finite; a run ends with its best image so far."""


def name_of(reward: Reward) -> str:
    """How results call a reward."""
    name = getattr(reward, "name", None)
    return name if isinstance(name, str) else getattr(reward, "__name__", type(reward).__name__)


@dataclass(slots=True)
class Fit:
    """The largest batch that the memory has been seen to hold; out of memory halves it."""

    size: int

    def parts(self, count: int, work: Callable[[range], T]) -> Iterator[T]:
        """``work`` on ``range(count)`` in parts of at most ``size``, in order.

        A part that does not fit is tried again in halves. Raises: out of memory for a single one.
        """
        first = 0
        while first < count:
            part = range(first, min(first + self.size, count))
            try:
                result = work(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.size = (len(part) + 1) // 2
                torch.cuda.empty_cache()
                continue
            yield result
            first = part.stop


@dataclass(slots=True)
class Scorer:
    """One reward for one prompt; every score that it gives has been checked."""

    reward: Reward
    prompt: str
    meter: Meter
    fit: Fit = field(default_factory=lambda: Fit(16))

    def __call__(self, images: Tensor) -> Tensor:
        """Scores [B], float64 on the CPU, of images [B, 3, H, W] or videos [B, T, 3, H, W].

        Raises: ValueError for scores of another shape, or not finite; what the reward raises.
        """
        self.meter.charge(rewards=len(images))
        return self.checked(images)

    def checked(self, images: Tensor) -> Tensor:
        """The scores, not counted."""
        with torch.no_grad():
            parts = list(self.fit.parts(len(images), lambda part: self._checked(images[part])))
        return torch.cat(parts)

    def differentiable(self, images: Tensor, reward: Reward) -> Tensor:
        """Scores [B] of images with a graph, by this or another reward; counted and checked.

        They may be not finite: whoever follows the gradient goes back then.
        Raises: ValueError for scores of another shape, or without a gradient.
        """
        self.meter.charge(rewards=len(images))
        scores = reward(images, [self.prompt] * len(images))
        name = name_of(reward)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"The reward {name} must return one score per image, a tensor of shape "
                f"[{len(images)}]; got {shape}."
            )
        if not scores.requires_grad:
            raise ValueError(
                f"The reward {name} gave scores without a gradient; use another reward, or a "
                "method that needs none, such as find."
            )
        return scores

    def _checked(self, images: Tensor) -> Tensor:
        scores = self.reward(images, [self.prompt] * len(images))
        name = name_of(self.reward)
        shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape != [len(images)]:
            raise ValueError(
                f"The reward {name} must return one score per image, a tensor of shape "
                f"[{len(images)}]; got {shape}."
            )
        scores = scores.detach().to("cpu", torch.float64)
        if not scores.isfinite().all():
            raise BadScore(f"The reward {name} returned {scores.tolist()}; scores must be finite.")
        return scores

    def probe(self, frames: int | None = None) -> None:
        """Score two grey images, or videos of so many ``frames``, so that a reward that cannot work
        says so before any compute."""
        shape = (2, 3, 64, 64) if frames is None else (2, frames, 3, 64, 64)
        self._checked(torch.full(shape, 0.5))

    def affords(self, scores: int) -> bool:
        """Whether the budget holds so many more scores."""
        limit = self.meter.budget.rewards
        return limit is None or self.meter.rewards + scores <= limit


@dataclass(slots=True)
class Ranking:
    """The best images so far; equal scores are settled by further rewards."""

    # the rewards that settle ties, in their order
    ties: tuple[Scorer, ...] = ()
    # the best first, at most KEPT
    top: list[Candidate] = field(default_factory=list)
    # the first finished image
    first: Candidate | None = None
    scored: int = 0
    # finished images that share the highest score
    equal: int = 0

    @property
    def best(self) -> Candidate | None:
        """The best finished image, None before the first."""
        return self.top[0] if self.top else None

    def add(self, candidate: Candidate) -> bool:
        """Remember a finished image. Returns whether it is the new best."""
        self.scored += 1
        self.first = self.first or candidate
        before = self.best
        if before is None or candidate.score > before.score:
            self.equal = 1
        elif candidate.score == before.score:
            self.equal += 1
            candidate = self._judged(candidate)
            self.top[0] = self._judged(before)
        place = next(
            (i for i, other in enumerate(self.top) if _key(candidate) > _key(other)), len(self.top)
        )
        self.top.insert(place, candidate)
        del self.top[KEPT:]
        return place == 0

    def _judged(self, candidate: Candidate) -> Candidate:
        # one score is kept back for the final call
        if candidate.others or not self.ties or not self.ties[0].affords(len(self.ties) + 1):
            return candidate
        scores = tuple(float(scorer(candidate.image[None])[0]) for scorer in self.ties)
        return replace(candidate, others=scores)


def _key(candidate: Candidate) -> tuple[float, ...]:
    return (candidate.score, *candidate.others)


def expected_best(scores: Sequence[float], count: int) -> float:
    """Unbiased estimate of the expected best of ``count`` draws from M >= ``count`` scores.

    The mean over all subsets: ``sum_i C(i - 1, n - 1) / C(M, n) r_(i)``, scores sorted upwards.
    Raises: ValueError for more draws than scores.
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"count must be in [1, {len(scores)}], the number of scores; got {count}.")
    total = math.comb(len(scores), count)
    ranked = enumerate(sorted(scores))
    return sum(math.comb(i, count - 1) * score for i, score in ranked) / total
