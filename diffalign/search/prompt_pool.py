"""Prompts that compete: drawn from the same noises, ranked, and again from what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from diffalign.core.search import Lineage, Move, Problem


@dataclass(frozen=True, slots=True)
class Entry:
    """A prompt with its scores in one round, one for each noise."""

    prompt: str
    scores: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean score, 0 before the first."""
        return fmean(self.scores) if self.scores else 0.0

    @property
    def rank(self) -> tuple[int, float]:
        """A prompt that was drawn more often stands above others, then the mean counts."""
        return len(self.scores), self.mean


@dataclass(frozen=True, slots=True)
class Pool:
    """Where a search over prompts stands."""

    # of the last round, best first
    entries: tuple[Entry, ...] = ()
    # prompts that go on, and the best one of the last round
    parents: tuple[str, ...] = ()
    best: str = ""
    # every prompt that was ever drawn
    known: tuple[str, ...] = ()
    rounds: int = 0
    # standard deviation of the original's scores: the unit of annealing
    spread: float = 0.0
    # the found prompt, None before the final comparison
    winner: str | None = None
    # mean gain over the original on fresh noises, and its standard error
    gain: float = 0.0
    error: float = 0.0


def draw(problem: Problem, prompt: str, seeds: Sequence[int]) -> list[float]:
    """Scores of images of ``prompt``, judged by the problem's own prompt."""
    variant = problem if prompt == problem.prompt else problem.variant(prompt=prompt)
    text = None if prompt == problem.prompt else prompt
    lineages = [Lineage((Move(0, seed),), prompt=text) for seed in seeds]
    images = variant.run(variant.start(seeds))
    return [candidate.score for candidate in variant.finish(images, lineages)]


def sizes(prompts: int, draws: int, halving: bool) -> list[int]:
    """Prompts of each draw: all, or the original and the better half of the others so far."""
    numbers = [prompts]
    while len(numbers) < draws:
        better = 1 + math.ceil((numbers[-1] - 1) / 2)
        numbers.append(better if halving else prompts)
    return numbers


def smaller(children: int, draws: int, final: int) -> tuple[int, int, int]:
    """A round with one less of what there is most of: wordings, noises, noises of the comparison.

    At least one of the three must be above 1.
    """
    if final >= max(children, draws):
        return children, draws, final - 1
    return (children - 1, draws, final) if children >= draws else (children, draws - 1, final)


def contest(
    problem: Problem, prompts: Sequence[str], draws: int, halving: bool
) -> tuple[Entry, ...]:
    """Prompts on the same fresh noises, best first. The problem's own is drawn from every noise."""
    seeds = problem.seeds(draws)
    if not halving:
        scores = [draw(problem, prompt, seeds) for prompt in prompts]
        return _sorted([Entry(prompt, tuple(s)) for prompt, s in zip(prompts, scores)])
    entries = [Entry(prompt) for prompt in prompts]
    for seed, size in zip(seeds, sizes(len(prompts), draws, halving), strict=True):
        # the original first, the others by rank
        entries = sorted(_sorted(entries), key=lambda entry: entry.prompt != problem.prompt)
        for i, entry in enumerate(entries[:size]):
            entries[i] = replace(
                entry, scores=(*entry.scores, *draw(problem, entry.prompt, [seed]))
            )
    return _sorted(entries)


def _sorted(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.rank, reverse=True))
