"""Search over paths: good images are noised a little and denoised again, in several ways."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.core.option import option
from diffalign.core.sampler import State
from diffalign.core.search import Info, Lineage, Method, Move, Problem
from diffalign.search.branching import affordable, finish, ranked, summary


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths of one search."""

    # None between two searches
    states: State | None = None
    lineages: tuple[Lineage, ...] = ()
    # searches that are over
    searches: int = 0


@dataclass(frozen=True)
class PathSearch(Method[Paths]):
    """Noise half-made images back by some evaluations, run them further than they were, repeat.

    ``paths`` images are run to the first ``begin`` of their evaluations. Then, in rounds, each is
    noised back by ``forward`` evaluations in ``children`` ways, all are run ``backward``
    evaluations further and scored by what their last evaluation predicts, and the best ``paths``
    stay. It needs no random sampler: the branching is in the noise that is added.

    Paper: Ma et al. 2025, arXiv:2501.09732, section 3 (search over paths). There random search is
    the better one on every text-to-image model at equal cost.
    Differs from the paper: spans are counted in evaluations instead of noise levels, a preview is
    the prediction of the last evaluation instead of one more, and the images of the last round
    are all finished.
    Cost: with N = paths, M = children, T evaluations of an image and s = round(begin T), a search
    takes N s evaluations and, in each round, N M backward (fewer in the last); there are
    ceil((T - s) / (backward - forward)) rounds, each with N M decoded and scored images. Making
    the result again takes all legs of its path, up to backward / (backward - forward) times T.
    Raises: ValueError unless ``backward`` is above ``forward``.
    """

    paths: int = option(2, "images that a round keeps", low=1)
    children: int = option(4, "ways in which each is noised", low=1)
    begin: float = option(0.3, "share of the evaluations before the first round", low=0.0, high=1.0)
    forward: int = option(2, "evaluations by which noise takes an image back", low=1)
    backward: int = option(5, "evaluations that are run from there", low=2)
    searches: int | None = option(
        None, "searches from fresh noise, none for as many as the budget allows", low=1
    )

    @property
    def ends(self) -> bool:
        return self.searches is not None

    def check(self) -> None:
        if self.backward <= self.forward:
            raise ValueError(
                "PathSearch(backward=...) must be above forward, or the images never get less "
                f"noisy; got forward={self.forward} and backward={self.backward}."
            )

    def first(self, count: int) -> int:
        """The evaluation of the first round, of ``count``: one that noise can take back."""
        return min(max(self.forward, round(self.begin * count)), count - 1)

    def refuses(self, problem: Problem) -> str | None:
        count = problem.sampler.count
        if count <= self.forward:
            return (
                f"forward={self.forward} evaluations back need more than {self.forward} "
                f"evaluations; this run has {count}."
            )
        return None

    def spans(self, count: int) -> list[tuple[int, int]]:
        """The evaluations that each leg of a path runs between, of ``count``."""
        at = self.first(count)
        legs = [(0, at)]
        while at < count:
            low = at - self.forward
            at = min(low + self.backward, count)
            legs.append((low, at))
        return legs

    def repeat_price(self, problem: Problem) -> int:
        legs = self.spans(problem.sampler.count)
        return sum(problem.sampler.price(low, last) for low, last in legs)

    def init(self, problem: Problem) -> Paths:
        return Paths()

    def step(self, problem: Problem, state: Paths) -> tuple[Paths, Info]:
        if state.states is None:
            return self._start(problem, state)
        count, paths = problem.sampler.count, state.states
        low = paths.step - self.forward
        last = min(low + self.backward, count)
        size = affordable(problem, len(state.lineages) * self.children, low, last, self.paths)
        width = size // len(state.lineages)
        if width == 0:
            scores = finish(problem, paths, state.lineages)
            return Paths(searches=state.searches + 1), summary("finished without a round", scores)
        rows = [row for row in range(len(state.lineages)) for _ in range(width)]
        seeds = problem.seeds(len(rows))
        children = problem.sampler.renoise(paths.select(rows), low, seeds)
        children = problem.run(children, last)
        lineages = [
            state.lineages[row].then(paths.step, seed, low) for row, seed in zip(rows, seeds)
        ]
        if last == count:
            scores = [candidate.score for candidate in problem.finish(children, lineages)]
            return Paths(searches=state.searches + 1), summary("finished", scores)
        scores = problem.preview(children).tolist()
        best = ranked(scores, self.paths)
        survivors = Paths(children.select(best), tuple(lineages[i] for i in best), state.searches)
        return survivors, summary(f"evaluation {last} of {count}", scores)

    def _start(self, problem: Problem, state: Paths) -> tuple[Paths, Info]:
        first = self.first(problem.sampler.count)
        size = affordable(problem, self.paths, 0, first, self.paths) or problem.room(1)
        seeds = problem.seeds(size)
        states = problem.run(problem.start(seeds), first)
        lineages = tuple(Lineage((Move(0, seed),)) for seed in seeds)
        return Paths(states, lineages, state.searches), Info(f"{size} fresh paths")

    def finished(self, state: Paths) -> bool:
        return self.searches is not None and state.searches >= self.searches
