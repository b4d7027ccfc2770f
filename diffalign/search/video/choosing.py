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
        ranks = self.mix == "ranks"
        keys = mixed_ranks(marks.scores, marks.weights) if ranks else marks.sums
        return [float(key) for key in keys]

    def weights(self) -> list[float] | None:
        """Of each part in the choice among whole videos, None where only their sum counts."""
        parts = parts_of(self.problem.reward, self.problem.prompt)
        several = self.mix == "ranks" and len(parts) > 1
        return [weight for weight, _ in parts] if several else None


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
        twigs = valued(twigs, marks.sums.tolist(), marks.frames)
        dropped += [twig for row, twig in enumerate(twigs) if row not in rows]
        round_ = round_.select(rows)
    return round_, dropped


def finish(chooser: Chooser, front: Front, round_: Round) -> tuple[Front, Info]:
    """Run videos to the end, as many as the budget lets, and score them against the prompt.

    Several rewards choose the winner by their ranks among all whole videos so far, one does by its
    score.
    """
    problem = chooser.problem
    round_ = round_.select(range(problem.room(len(round_.lineages), round_.states.step)))
    whole = round_.states.finished
    round_ = round_ if whole else replace(round_, states=problem.run(round_.states))
    weights = chooser.weights()
    candidates = problem.finish(round_.states, round_.lineages, parts=weights is not None)
    scores = [candidate.score for candidate in candidates]
    known, before = [c.parts or (c.score,) for c in candidates], len(front.whole)
    pool = torch.tensor([*front.whole, *known], dtype=torch.float64).T
    keys = mixed_ranks(pool, weights or [1.0]).tolist()
    first = ranked(keys[before:], 1)[0]
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
    better = front.leader is None or keys[before + first] > keys[front.leader]
    winner: Candidate | None = candidates[first] if better and weights else front.winner
    after = Front(
        front.texts,
        twigs=tuple(twigs),
        trees=front.trees + 1,
        winner=winner,
        whole=(*front.whole, *known),
        leader=before + first if better else front.leader,
        best=places[first] if better else front.best,
    )
    return after, summary(f"{len(candidates)} whole videos", scores)
