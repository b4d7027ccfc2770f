"""Beam search over the steps: several continuations of every image, the best ones stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from diffalign.core.option import option
from diffalign.core.sampler import State, join
from diffalign.core.search import Info, Lineage, Method, Move, Problem
from diffalign.search.branching import advance, affordable, finish, outcomes, ranked, summary


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a beam search, every number known."""

    beams: int = 2
    children: int = 4
    every: int = 2
    group: str = "global"
    shrink: float = 1.0
    widen: bool = False

    def width(self, step: int, count: int) -> int:
        """Beams that the choice after evaluation ``step`` of ``count`` keeps."""
        progress = min(step / max(count - 1, 1), 1.0)
        return max(self.beams, int(self.beams * self.shrink * self.shrink**-progress))


PRESETS = {
    "beam": Layout(),
    "svdd": Layout(1, 20, 1, "per_beam"),
    "code": Layout(1, 25, 2, "global"),
    "dsearch": Layout(1, 5, 1, "global", 5.0, True),
}
"""The published searches; ``beam`` is ours."""


@dataclass(frozen=True, slots=True)
class Front:
    """The beams of one search."""

    # None between two searches
    states: State | None = None
    # one evaluation earlier, where the kernel does not say how it draws
    before: State | None = None
    lineages: tuple[Lineage, ...] = ()
    # searches that are over
    searches: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """The images that compete in one choice."""

    images: State
    lineages: tuple[Lineage, ...]
    # the beam of each
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Beam(Method[Front]):
    """Continue every image in several ways, score what it will be, go on with the best.

    Every ``every`` evaluations each of ``beams`` images gets ``children`` continuations: the one
    that it has, and others that differ by the noise of the last step. They are run ``every``
    evaluations, scored by the prediction of the last one, and the best ``beams`` stay: of all
    (``group="global"``) or each beam's own (``"per_beam"``). The first continuations are start
    noises, so ``every`` as large as the trajectory is best-of-N of ``beams`` x ``children``, and
    one child is the plain sampler. Needs a sampler that draws noise while it runs.

    Presets, whose numbers your own options replace: ``svdd`` (Li et al. 2024, arXiv:2408.08252,
    its posterior-mean variant with the limit of temperature 0 that its code takes), ``code``
    (Singh et al. 2025, arXiv:2502.00968, blocks of 2 evaluations as in arXiv:2503.19385),
    ``dsearch`` (Li et al. 2025, arXiv:2503.02039): the number of beams falls geometrically from
    ``shrink`` x ``beams``, and children grow as it falls (``widen``) with probability
    ``1 - exp(-3 i / (T - 1))`` at evaluation i.
    Differs from the papers: one evaluation of a child serves both its score and its next step.
    Cost: beams x children x T evaluations for T of an image, and ``lookahead`` more for each
    child and choice; beams x children decoded and scored images for each choice. A kernel that
    does not say how it draws costs one evaluation more for each further child and choice.
    """

    preset: Literal["beam", "svdd", "code", "dsearch"] = option("beam", "where numbers come from")
    beams: int | None = option(None, "images that a choice keeps, none for the preset's", low=1)
    children: int | None = option(None, "continuations of each image, none for the preset's", low=1)
    every: int | None = option(
        None, "evaluations between two choices, none for the preset's", low=1
    )
    group: Literal["global", "per_beam"] | None = option(
        None, "who competes with whom, none for the preset's"
    )
    select: Literal["top", "softmax"] = option(
        "top", "the best stay, or a draw by exp(score / temperature)"
    )
    temperature: float = option(0.1, "temperature of the draw", low=0.0, open_low=True)
    lookahead: int = option(0, "further evaluations before an image is scored", low=0)
    shrink: float | None = option(
        None, "beams at the start for each at the end, none for the preset's", low=1.0
    )
    widen: bool | None = option(
        None, "whether children grow as beams are dropped, none for the preset's"
    )
    searches: int | None = option(
        None, "searches from fresh noise, none for as many as the budget allows", low=1
    )

    branches = True

    @property
    def ends(self) -> bool:
        return self.searches is not None

    @property
    def layout(self) -> Layout:
        """The preset with the options that were set."""
        values = {f.name: getattr(self, f.name) for f in fields(Layout)}
        numbers = {name: value for name, value in values.items() if value is not None}
        return replace(PRESETS[self.preset], **numbers)

    def init(self, problem: Problem) -> Front:
        return Front()

    def step(self, problem: Problem, state: Front) -> tuple[Front, Info]:
        layout, count = self.layout, problem.sampler.count
        step = 0 if state.states is None else state.states.step
        last = min(step + layout.every, count)
        size = self._size(problem, state, step, last)
        if state.states is None:
            round_ = self._fresh(problem, size or problem.room(1), layout.beams)
        elif size < len(state.lineages):
            scores = finish(problem, state.states, state.lineages)
            return Front(searches=state.searches + 1), summary("finished without a choice", scores)
        else:
            round_ = self._expand(problem, state, size // len(state.lineages))
        if last == count:
            scores = finish(problem, round_.images, round_.lineages)
            return Front(searches=state.searches + 1), summary("finished", scores)
        images, before = advance(problem, round_.images, last)
        keep, text = layout.width(last, count), f"evaluation {last} of {count}"
        if len(round_.lineages) <= keep:
            return Front(images, before, round_.lineages, state.searches), Info(text)
        scored = min(last + self.lookahead, count)
        ahead = problem.run(images, scored) if scored > last else images
        scores = problem.preview(ahead).tolist()
        groups = round_.groups if layout.group == "per_beam" else None
        draw = (self.temperature, problem.rng) if self.select == "softmax" else None
        best = choice(scores, keep, groups, draw)
        front = Front(
            images.select(best),
            None if before is None else before.select(best),
            tuple(round_.lineages[row] for row in best),
            state.searches,
        )
        return front, summary(text, scores)

    def _size(self, problem: Problem, state: Front, step: int, last: int) -> int:
        """Images of this round: all that are wanted, or as many as the budget lets end."""
        layout, count = self.layout, problem.sampler.count
        beams = layout.width(step, count) if state.states is None else len(state.lineages)
        wanted = beams * self._children(problem, layout, step)
        first = step if state.before is None else step - 1
        scored = min(last + self.lookahead, count) if last < count else count
        return affordable(problem, wanted, first, scored, layout.width(last, count), last)

    def _children(self, problem: Problem, layout: Layout, step: int) -> int:
        count = problem.sampler.count
        if not layout.widen or step == 0:
            return layout.children
        chance = 1.0 - math.exp(-3.0 * step / max(count - 1, 1))
        if float(torch.rand((), generator=problem.rng)) >= chance:
            return layout.children
        return round(layout.children * layout.width(0, count) / layout.width(step, count))

    def _fresh(self, problem: Problem, size: int, beams: int) -> Round:
        seeds = problem.seeds(size)
        lineages = tuple(Lineage((Move(0, seed),)) for seed in seeds)
        return Round(problem.start(seeds), lineages, tuple(row % beams for row in range(size)))

    def _expand(self, problem: Problem, state: Front, width: int) -> Round:
        """Each beam's own continuation, and ``width - 1`` others of each."""
        assert state.states is not None
        beams = range(len(state.lineages))
        if width == 1:
            return Round(state.states, state.lineages, tuple(beams))
        rows = [beam for beam in beams for _ in range(width - 1)]
        seeds = problem.seeds(len(rows))
        others = outcomes(problem, state.states, state.before, rows, seeds)
        drawn = state.states.step - 1
        branches = [state.lineages[row].then(drawn, seed) for row, seed in zip(rows, seeds)]
        images = join([state.states, others])
        return Round(images, (*state.lineages, *branches), (*beams, *rows))

    def finished(self, state: Front) -> bool:
        return self.searches is not None and state.searches >= self.searches


def choice(
    scores: Sequence[float],
    keep: int,
    groups: Sequence[int] | None = None,
    draw: tuple[float, torch.Generator] | None = None,
) -> list[int]:
    """Indices of the scores that stay: the highest ``keep``, or the highest of each group.

    ``draw``: a temperature and a generator, to draw by exp(score / temperature) instead.
    """
    keys = list(scores)
    if draw is not None:
        temperature, rng = draw
        # the largest of logits plus Gumbel noise is a draw by their softmax, the largest k are
        # draws without replacement
        uniform = torch.rand(len(keys), generator=rng, dtype=torch.float64)
        noise = -(-uniform.clamp(min=1e-300).log()).log()
        keys = (torch.tensor(keys, dtype=torch.float64) / temperature + noise).tolist()
    if groups is None:
        return ranked(keys, keep)
    return [
        max((row for row in range(len(keys)) if groups[row] == group), key=keys.__getitem__)
        for group in sorted(set(groups))
    ]
