"""Where a hunt for failures stands, and how its images are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffalign.core.reward import Failures
from diffalign.core.search import Candidate, Info, Problem
from diffalign.core.words import Shift

Phase = Literal["search", "fresh", "random", "done"]
"""What a hunt does: it searches, confirms what it found, tries chance."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Images, those that the ensemble calls failures, and those of them that are confirmed."""

    images: int = 0
    failures: int = 0
    confirmed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.failures + other.failures,
            self.confirmed + other.confirmed,
        )

    @property
    def rate(self) -> float:
        """Share of confirmed failures."""
        return self.confirmed / max(self.images, 1)

    @property
    def agreement(self) -> float:
        """Share of the ensemble's failures that the judge outside it confirms."""
        return self.confirmed / max(self.failures, 1)


@dataclass(frozen=True, slots=True)
class Phrase:
    """A prompt of the search with its words in the slots and its mean score."""

    prompt: str
    words: tuple[str, ...]
    score: float
    tally: Tally = Tally()


@dataclass(frozen=True, slots=True)
class Hunt:
    """Where a hunt stands."""

    phase: Phase = "search"
    iteration: int = 0
    # images that the search has made
    total: int = 0
    # latent: [1, ...]; the seed is of later noise
    noise: Tensor | None = None
    seed: int = 0
    # prompt: the best ones, best first
    beam: tuple[Phrase, ...] = ()
    # embedding: what is added to that of the free token, and the optimiser's memory
    shift: Shift | None = None
    moments: tuple[Tensor, ...] = ()
    # the failure, None before it is accepted
    failure: Candidate | None = None
    fresh: Tally = Tally()
    random: Tally = Tally()


class Prey(Protocol):
    """One of the three searches."""

    def search(self, problem: Problem, hunt: Hunt) -> tuple[Hunt, Info]:
        """One round; the phase is "fresh" when something is to be confirmed."""
        ...

    def fresh(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        """Images of what was accepted, with seeds that the search has not seen."""
        ...

    def random(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        """Images of what chance would have tried."""
        ...


def judged(problem: Problem, candidates: Sequence[Candidate]) -> Tally:
    """How many of the images fail, and how many of these failures are confirmed."""
    reward = problem.reward
    assert isinstance(reward, Failures)
    images = torch.stack([candidate.image for candidate in candidates])
    problem.meter.charge(rewards=len(images))
    fails = reward.fails(images, [problem.prompt] * len(images))
    failures = images[fails.cpu()]
    confirmed = 0
    if len(failures):
        confirmed = int(reward.confirms(failures, [problem.prompt] * len(failures)).sum())
    return Tally(len(images), len(failures), confirmed)
