"""What the searches share that branch inside a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from diffalign.core.errors import BudgetExceeded, UnsupportedModel
from diffalign.core.sampler import State
from diffalign.core.search import Info, Lineage, Problem


def affordable(
    problem: Problem,
    count: int,
    first: int,
    last: int,
    survivors: int = 0,
    resume: int | None = None,
) -> int:
    """How many of ``count`` images may run between two evaluations and be scored, 0 for none.

    What remains of the budget then lets ``survivors`` of them (all, where there are fewer) run
    from ``resume`` (None: from ``last``) to the end and be scored, and covers the final call.
    """
    price = problem.sampler.price(first, last)
    rest = problem.sampler.price(last if resume is None else resume)

    def fits(size: int) -> bool:
        finals = min(size, survivors) if rest else 0
        # the rest of the survivors' trajectories, in images of this segment
        rows = size + math.ceil(finals * rest / max(price, 1))
        return has_room(problem, rows, first, last, 0) and has_room(
            problem, size + finals, last, last, 1
        )

    return most(count, fits)


def most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``count`` that fits, 0 for none; what is larger fits no better."""
    good, bad = 0, count + 1
    while good + 1 < bad:
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def has_room(problem: Problem, count: int, first: int, last: int, scores: int) -> bool:
    """Whether the budget lets all of ``count`` images run, each scored ``scores`` times."""
    try:
        return problem.room(count, first, last, scores) >= count
    except BudgetExceeded:
        return False


def redraws(problem: Problem) -> bool:
    """Whether the kernel says from which law a step drew, so that drawing again costs nothing."""
    try:
        problem.sampler.std(0)
    except UnsupportedModel:
        return False
    return True


def outcomes(
    problem: Problem, state: State, before: State | None, rows: Sequence[int], seeds: Sequence[int]
) -> State:
    """Other outcomes of the last evaluation of those images, each by a fresh seed.

    They are what ``reseed`` gives one evaluation earlier. ``before``: the states there, needed and
    run again where the kernel does not say how it draws.
    """
    if before is None:
        return problem.sampler.redraw(state.select(rows), seeds)
    return problem.run(before.select(rows).reseed(seeds), state.step)


def advance(problem: Problem, state: State, until: int) -> tuple[State, State | None]:
    """Run to ``until``; also the states one evaluation before, where ``outcomes`` needs them."""
    if redraws(problem):
        return problem.run(state, until), None
    before = problem.run(state, until - 1) if until - 1 > state.step else state
    return problem.run(before, until), before


def ranked(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the ``count`` highest scores, best first; of equal ones the earlier."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def finish(problem: Problem, states: State, lineages: Sequence[Lineage]) -> list[float]:
    """Run images to the end, as many as the budget lets; their scores."""
    rows = range(problem.room(len(lineages), states.step))
    images = problem.run(states.select(rows) if len(rows) < len(lineages) else states)
    candidates = problem.finish(images, [lineages[row] for row in rows])
    return [candidate.score for candidate in candidates]


def summary(text: str, scores: Sequence[float]) -> Info:
    """What a round reports of its scores."""
    return Info(text, {"mean": sum(scores) / len(scores), "highest": max(scores)})
