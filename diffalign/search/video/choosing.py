"""How a Tree-of-Frames chooses: beginnings of videos by their stage, whole ones by the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffalign.core.sampler import State
from diffalign.core.search import Candidate, Info, Marks, Problem, Stage
from diffalign.rewards.weighted import parts_of
from diffalign.search.branching import ranked, summary
from diffalign.search.ranks import mixed_ranks
from diffalign.search.video.front import Front, Round, Twig, twigs_of, valued
from diffalign.search.video.sampler import numbers

Mix = Literal["ranks", "scores"]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Scores videos as far as they are, each stage against its own text."""

    problem: Problem
    texts: Mapping[Stage, str]
    mix: Mix

    def marks(self, states: State, stage: Stage) -> Marks:
        """What the rewards say of them at a stage."""
        return self.problem.marks(states, self.texts[stage], stage)

    def keys(self, marks: Marks) -> list[float]:
        """What a choice goes by: higher is better."""
        if self.mix == "scores":
            return sums(marks)
        keys: list[float] = mixed_ranks(marks.scores, marks.weights).tolist()
        return keys


def sums(marks: Marks) -> list[float]:
    """Weighted sums of the rewards' scores."""
    values: list[float] = (torch.tensor(marks.weights, dtype=torch.float64) @ marks.scores).tolist()
    return values


def prune(
    chooser: Chooser, round_: Round, evaluations: Sequence[int], keep: int
) -> tuple[Round, list[Twig]]:
    """First chunks without the worse half at each of these evaluations, never fewer than ``keep``,
    and those that were dropped."""
    dropped: list[Twig] = []
    for evaluation in evaluations:
        size = len(round_.lineages)
        if size <= keep:
            break
        round_ = replace(round_, states=chooser.problem.look(round_.states, evaluation))
        marks = chooser.marks(round_.states, "first")
        rows = sorted(ranked(chooser.keys(marks), max(-(-size // 2), keep)))
        twigs = [Twig(None, 1, str(number)) for number in numbers(round_.states)]
        twigs = valued(twigs, sums(marks), marks.frames)
        dropped += [twig for row, twig in enumerate(twigs) if row not in rows]
        round_ = round_.select(rows)
    return round_, dropped


def finish(chooser: Chooser, front: Front, round_: Round) -> tuple[Front, Info]:
    """Run videos to the end, as many as the budget lets, and score them against the prompt.

    Several rewards choose the winner by their ranks, one does by its score.
    """
    problem = chooser.problem
    round_ = round_.select(range(problem.room(len(round_.lineages), round_.states.step)))
    whole = round_.states.finished
    round_ = round_ if whole else replace(round_, states=problem.run(round_.states))
    several = chooser.mix == "ranks" and len(parts_of(problem.reward, problem.prompt)) > 1
    keys = chooser.keys(problem.marks(round_.states, problem.prompt)) if several else None
    candidates = problem.finish(round_.states, round_.lineages)
    scores = [candidate.score for candidate in candidates]
    first = ranked(scores if keys is None else keys, 1)[0]
    frames = torch.stack([candidate.image[-1] for candidate in candidates])
    twigs = list(front.twigs)
    if whole:
        places = [place for place in round_.places if place is not None]
        leaves = valued([twigs[place] for place in places], scores, frames)
        for place, leaf in zip(places, leaves):
            twigs[place] = leaf
    else:
        places = list(range(len(twigs), len(twigs) + len(candidates)))
        twigs += valued(twigs_of(round_), scores, frames)
    better = front.best is None or scores[first] > twigs[front.best].value
    winner: Candidate | None = candidates[first] if better and several else front.winner
    after = Front(
        front.texts,
        twigs=tuple(twigs),
        trees=front.trees + 1,
        winner=winner,
        best=places[first] if better else front.best,
    )
    return after, summary(f"{len(candidates)} whole videos", scores)
