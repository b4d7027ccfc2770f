"""Rollover budget forcing: as many tries at each step as it takes, the rest for later steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from diffalign.core.option import option
from diffalign.core.sampler import State, join
from diffalign.core.search import Info, Lineage, Method, Move, Problem
from diffalign.search.branching import (
    advance,
    affordable,
    finish,
    outcomes,
    ranked,
    redraws,
    summary,
)


@dataclass(frozen=True, slots=True)
class Path:
    """One image on its way."""

    # one image
    state: State
    # one evaluation earlier, where the kernel does not say how it draws
    before: State | None
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class Rollover:
    """Where one search stands."""

    # None between two searches
    path: Path | None = None
    # the preview that a child must beat
    target: float = -math.inf
    # tries of each step; of this one, with what rolled over; and those that were made
    quota: int = 0
    allowed: int = 0
    tries: int = 0
    # the best child of this step so far
    child: Path | None = None
    score: float = -math.inf
    # searches that are over
    searches: int = 0


@dataclass(frozen=True)
class RBF(Method[Rollover]):
    """Try continuations of one image until its preview gets better, then take the next step.

    The image starts as the best preview of ``starts`` noises. At each step continuations are
    tried until one beats the best preview so far; tries that are not used roll over to later
    steps. Where none beats it, the best of the step is taken. The last step finishes every try,
    until none is left. Needs a sampler that draws noise while it runs; the paper's is the
    flow converted to a variance-preserving path, whose children differ most.

    Paper: Kim et al. 2025, arXiv:2503.19385, algorithm 1 (rollover budget forcing).
    Differs from the paper: the result is the best finished image, not the last one, and the first
    try of a step is the continuation that the image has, so that one try is the plain sampler.
    Cost: starts + quota (T - 1) evaluations for T of an image, whether tries succeed or not, one
    decoded and scored image for each; fewer tries where the budget is smaller. A kernel that does
    not say how it draws costs up to twice that.
    """

    starts: int = option(25, "noises of which the best begins", low=1)
    quota: int = option(22, "tries of a step, before those of earlier steps", low=1)
    batch: int = option(1, "tries that run at once; the best of them counts", low=1)
    searches: int | None = option(
        None, "searches from fresh noise, none for as many as the budget allows", low=1
    )

    branches = True

    @property
    def ends(self) -> bool:
        return self.searches is not None

    def init(self, problem: Problem) -> Rollover:
        return Rollover()

    def step(self, problem: Problem, state: Rollover) -> tuple[Rollover, Info]:
        if state.path is None:
            return self._start(problem, state)
        path, count = state.path, problem.sampler.count
        step = path.state.step
        size = min(self.batch, state.allowed - state.tries)
        first = step if path.before is None else step - 1
        size = affordable(problem, size, first, step + 1, 1) if size else 0
        if size == 0:
            path = state.child or path
            scores = finish(problem, path.state, [path.lineage])
            return Rollover(searches=state.searches + 1), summary("no budget for a try", scores)
        images, lineages = self._children(problem, path, size, own=state.tries == 0)
        tries = state.tries + size
        if step + 1 == count:
            info = summary("finished", finish(problem, images, lineages))
            over = tries >= state.allowed
            rest = replace(state, tries=tries)
            return Rollover(searches=state.searches + 1) if over else rest, info
        images, before = advance(problem, images, step + 1)
        scores = problem.preview(images).tolist()
        best = ranked(scores, 1)
        child, score = state.child, state.score
        if child is None or scores[best[0]] > score:
            earlier = None if before is None else before.select(best)
            child, score = Path(images.select(best), earlier, lineages[best[0]]), scores[best[0]]
        later = replace(state, child=child, score=score, tries=tries)
        text = f"step {step + 1} of {count}, try {tries} of {state.allowed}"
        return self._next(later), summary(text, scores)

    def _next(self, state: Rollover) -> Rollover:
        """The next step, once a child beats the target or the tries are used up."""
        accepted = state.score > state.target
        if not accepted and state.tries < state.allowed:
            return state
        return Rollover(
            path=state.child,
            target=max(state.score, state.target),
            quota=state.quota,
            allowed=state.quota + state.allowed - state.tries,
            searches=state.searches,
        )

    def _start(self, problem: Problem, state: Rollover) -> tuple[Rollover, Info]:
        """The best of the first previews, and the tries that the budget lets each step have."""
        count = problem.sampler.count
        size = affordable(problem, self.starts, 0, 1, 1) or problem.room(1)
        seeds = problem.seeds(size)
        lineages = [Lineage((Move(0, seed),)) for seed in seeds]
        if count == 1:
            scores = finish(problem, problem.start(seeds), lineages)
            return Rollover(searches=state.searches + 1), summary("finished", scores)
        images, before = advance(problem, problem.start(seeds), 1)
        scores = problem.preview(images).tolist()
        best = ranked(scores, 1)
        path = Path(
            images.select(best), None if before is None else before.select(best), lineages[best[0]]
        )
        quota, rest = self._quota(problem)
        start = Rollover(path, scores[best[0]], quota, quota + rest, searches=state.searches)
        return start, summary(f"{size} starts, {quota} tries a step", scores)

    def _quota(self, problem: Problem) -> tuple[int, int]:
        """Tries of a step, ``quota`` or an equal share of the budget, and what is over."""
        count, sampler = problem.sampler.count, problem.sampler
        back = 0 if redraws(problem) else 1
        dearest = max(range(1, count), key=lambda step: sampler.price(step - back, step + 1))
        total = affordable(problem, self.quota * (count - 1), dearest - back, dearest + 1)
        return divmod(total, count - 1)

    def _children(
        self, problem: Problem, path: Path, size: int, own: bool
    ) -> tuple[State, list[Lineage]]:
        """``size`` continuations; the first one is the image's own where it was not tried yet."""
        if own and size == 1:
            return path.state, [path.lineage]
        seeds = problem.seeds(size - own)
        others = outcomes(problem, path.state, path.before, [0] * len(seeds), seeds)
        branches = [path.lineage.then(path.state.step - 1, seed) for seed in seeds]
        if not own:
            return others, branches
        return join([path.state, others]), [path.lineage, *branches]

    def finished(self, state: Rollover) -> bool:
        return self.searches is not None and state.searches >= self.searches
