"""Diffusion tree sampling and search: rollouts branch off states whose images did well."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from diffalign.core import BudgetExceeded, Info, Lineage, Method, Problem, State, Tensor, Tree
from diffalign.core.option import option
from diffalign.core.sampler import join
from diffalign.search.tree import ROOT, Backup, Batch, Grown, Rule, Spot, Workspace, branch_levels
from diffalign.search.weights import Weighted

Preset = Literal["auto", "paper", "small", "spread"]
RULES = {"paper": Rule(2.0, 0.8), "small": Rule(1.0, 0.5), "spread": Rule(2.0, 0.3, 0.2)}
"""Widening of each preset; under "paper" the first 36 rollouts are plain samples."""
SMALL = 100
"""A budget below so many trajectories, or of seconds alone, is small: ``preset="auto"`` then widens
slowly."""
FREE = 64
"""Visits of finished images in a row, after which a new one is drawn whatever the rule says."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trajectory that is to be drawn below a spot."""

    spot: int
    seed: int
    lineage: Lineage


@dataclass(frozen=True)
class TreeSearch(Method[Grown]):
    """What tree sampling and tree search share: everything but the choice of a child."""

    branches: ClassVar[bool] = True
    # the preset that "auto" takes for a small budget
    slow: ClassVar[str] = "small"

    _: KW_ONLY
    tilt: float = option(
        1.0, "images count by exp(tilt * score)", low=0.0, open_low=True, usual=(0.1, 20.0)
    )
    preset: Preset = option("auto", "how fast the tree widens; auto looks at the budget")
    width: float | None = option(
        None, "children allowed at one visit, none for the preset's", low=0.0, open_low=True
    )
    growth: float | None = option(
        None, "children grow by visits to this power, none for the preset's", low=0.0, high=1.0
    )
    epsilon_uniform: float | None = option(
        None, "share of children chosen at random, none for the preset's", low=0.0, high=1.0
    )
    levels: int = option(5, "places of a trajectory where it may branch, noise included", low=1)
    backup: Backup = option("soft", "a state's value: soft mean or largest of its children's")
    batch: int = option(4, "rollouts in one round", low=1)

    def rule(self, problem: Problem) -> Rule:
        """How wide the tree grows, with the preset that fits the budget."""
        name: str = self.preset
        if name == "auto":
            name = "paper" if _ample(problem) else self.slow
        preset = RULES[name]
        return Rule(
            preset.width if self.width is None else self.width,
            preset.growth if self.growth is None else self.growth,
            preset.uniform if self.epsilon_uniform is None else self.epsilon_uniform,
        )

    def init(self, problem: Problem) -> Grown:
        levels = branch_levels(problem.sampler.count, self.levels)
        return Grown(self.rule(problem), levels, self.tilt, self.backup)

    def step(self, problem: Problem, state: Grown) -> tuple[Grown, Info]:
        work = Workspace(state)
        places = self._places(problem, work)
        seeds = problem.seeds(len(places))
        rollouts = [_rollout(state, place, seed) for place, seed in zip(places, seeds)]
        leaves, scores = roll_out(problem, work, rollouts)
        work.back_up(leaves)
        tree = work.frozen(scores)
        values = {
            "images": float(tree.images),
            "effective": tree.effective,
            "log_evidence": tree.log_evidence,
            "mean": sum(scores) / len(scores),
        }
        return tree, Info(f"{tree.images} images, {tree.effective:.1f} effective", values)

    def tree(self, state: Grown) -> Tree | None:
        return state.drawing()

    def weighted(self, state: Grown) -> Weighted:
        """Scores and weights of the finished images, in the order of ``state.leaves``."""
        return state.weighted()

    def samples(self, problem: Problem, state: Grown, count: int) -> Tensor:
        """``count`` images [count, 3, H, W] drawn by their weights; costs their decodes only."""
        picks = self.weighted(state).pick(count, problem.rng)
        leaves = state.leaves
        distinct = sorted(set(picks))
        images = problem.decode(join([state.state(leaves[pick]) for pick in distinct]))
        return images[[distinct.index(pick) for pick in picks]]

    @abstractmethod
    def choose(self, work: Workspace, index: int, draw: float) -> int:
        """The child of a spot to which a descent goes on. ``draw``: uniform in [0, 1)."""

    def _places(self, problem: Problem, work: Workspace) -> list[int]:
        """The spots below which this round draws: as many as batch and budget hold."""
        ways = [self._descent(problem, work) for _ in range(self.batch)]
        steps = [work.spots[way[-1]].step for way in ways]
        while len(ways) > 1 and not _fits(problem, steps[: len(ways)]):
            work.visit(ways.pop(), -1)
        if len(ways) == 1:
            problem.room(1, steps[0])
        return [way[-1] for way in ways]

    def _descent(self, problem: Problem, work: Workspace) -> list[int]:
        """The path to a spot that may have one more child.

        A descent to a finished image costs nothing; it counts as a visit, which opens the spots
        above it, and another descent follows.
        """
        for free in reversed(range(FREE + 1)):
            way = [ROOT]
            while not work.spots[way[-1]].leaf and not work.opens(way[-1]):
                way.append(self._child(problem, work, way[-1]))
            if not work.spots[way[-1]].leaf:
                break
            if free == 0:
                way.pop()
                break
            work.visit(way)
        work.visit(way)
        work.pending[way[-1]] = work.pending.get(way[-1], 0) + 1
        return way

    def _child(self, problem: Problem, work: Workspace, index: int) -> int:
        uniform, draw = torch.rand(2, dtype=torch.float64, generator=problem.rng).tolist()
        if uniform < work.tree.rule.uniform:
            children = work.children[index]
            return children[int(draw * len(children))]
        return self.choose(work, index, draw)


@dataclass(frozen=True)
class DTS(TreeSearch):
    """Sample from ``p(x0) exp(tilt * score)``: a tree of rollouts that all budgets improve.

    Every rollout is a whole trajectory, and only its finished image is scored. Its states at the
    branch levels become nodes. A state that has fewer than ``width * visits ** growth`` children
    gets one more; else the descent goes on to a child, with probability in proportion to
    ``exp(tilt * value)``. Values go up as uniform soft means. ``weighted`` gives the images with
    the weights of such descents, their effective number and the estimate of Z.

    The law is exact only in the limit. At a finite budget Z is estimated too low, the more so the
    faster the tree widens: with the paper's (2, 0.8) the first 36 rollouts are plain samples, and
    on an easy one-dimensional case it does not beat weighted plain samples. So a budget below 100
    trajectories takes (2, 0.3) with a fifth of the choices at random, unless options say otherwise.

    Paper: Jain, Sareen, Pedramfar and Ravanbakhsh 2025, arXiv:2506.20701, algorithm 1.
    Differs from the paper: rollouts come in batches, each counted as a visit before it is back;
    ``epsilon_uniform``; slower widening for small budgets.
    Cost: a rollout below a state takes the evaluations that are left there, one decode and one
    score.
    """

    slow: ClassVar[str] = "spread"

    def choose(self, work: Workspace, index: int, draw: float) -> int:
        children = work.children[index]
        values = self.tilt * np.array([work.values[child] for child in children])
        edges = np.exp(values - values.max()).cumsum()
        place = int(np.searchsorted(edges, draw * edges[-1], side="right"))
        return children[min(place, len(children) - 1)]


@dataclass(frozen=True)
class DTSStar(TreeSearch):
    """Search one image of high score with the tree of ``DTS`` and the rule of UCT.

    A descent goes on to the child with the largest ``value + explore * sqrt(log(visits of the
    state) / visits of the child)``. Values are scaled to [0, 1] by the lowest and highest score so
    far, in this rule only, so that ``explore`` does not depend on the reward's unit. Values go up
    as soft means, as in the paper: they prefer states with many good images to those with one.

    Paper: Jain, Sareen, Pedramfar and Ravanbakhsh 2025, arXiv:2506.20701, section 4 (DTS*).
    Differs from the paper: the result is the image of highest score, not that of the greedy
    descent (``state.greedy()``); the scaling of values; budgets below 100 trajectories take (1,
    0.5), because with (2, 0.8) the first 36 rollouts are those of ``BestOfN``; batches.
    Cost: as ``DTS``.
    """

    explore: float = option(1.0, "weight of children with few visits", low=0.0, usual=(0.0, 4.0))

    def choose(self, work: Workspace, index: int, draw: float) -> int:
        low, high = work.tree.range
        scale = 1.0 / (high - low) if high > low else 0.0
        total = math.log(work.visits[index])

        def bound(child: int) -> float:
            value = scale * (work.values[child] - low)
            return value + self.explore * math.sqrt(total / work.visits[child])

        return max(work.children[index], key=bound)


def _ample(problem: Problem) -> bool:
    """Whether the budget holds ``SMALL`` trajectories; seconds alone do not say so."""
    budget = problem.meter.budget
    limits = [budget.rewards, budget.decodes]
    if budget.nfe is not None:
        limits.append(budget.nfe // problem.sampler.price())
    counts = [limit for limit in limits if limit is not None]
    return min(counts) >= SMALL if counts else budget.seconds is None


def _rollout(tree: Grown, place: int, seed: int) -> Rollout:
    spot = tree.spots[place]
    return Rollout(place, seed, spot.lineage.then(spot.step, seed))


def _fits(problem: Problem, steps: list[int]) -> bool:
    """Whether the budget holds these rollouts, counted in whole trajectories."""
    rows = sum(problem.sampler.price(step) for step in steps)
    images = -(-rows // problem.sampler.price())
    try:
        return problem.room(images, scores=-(-len(steps) // images)) == images
    except BudgetExceeded:
        return False


def roll_out(
    problem: Problem, work: Workspace, rollouts: list[Rollout]
) -> tuple[list[int], list[float]]:
    """Run trajectories to the end and attach what they pass; the leaves and their scores.

    All that are under way at a branch level run to the next one as one batch.
    """
    levels = work.tree.levels
    state: State | None = None
    active: list[Rollout] = []
    parents: list[int] = []
    for level, end in zip(levels, (*levels[1:], None)):
        starters = [r for r in rollouts if work.spots[r.spot].step == level]
        if starters:
            seeds = [r.seed for r in starters]
            if level == 0:
                fresh = problem.start(seeds)
            else:
                fresh = join([work.tree.state(r.spot) for r in starters]).reseed(seeds)
            state = fresh if state is None else join([state, fresh])
            active += starters
            parents += [r.spot for r in starters]
        if state is None:
            continue
        state = problem.run(state, end)
        if end is not None:
            parents = _attach(work, Batch.of(state), parents, active, end)
    assert state is not None
    finished = problem.finish(state, [r.lineage for r in active])
    scores = [candidate.score for candidate in finished]
    batch = Batch.of(state, [candidate.image for candidate in finished])
    leaves = _attach(work, batch, parents, active, state.count, scores)
    return leaves, scores


def _attach(
    work: Workspace,
    batch: Batch,
    parents: list[int],
    active: list[Rollout],
    step: int,
    scores: list[float] | None = None,
) -> list[int]:
    """Add a spot for each image of a batch; their indices."""
    work.batches.append(batch)
    number = len(work.batches) - 1
    return [
        work.attach(
            Spot(parent, step, rollout.lineage, number, row, scores is not None),
            math.nan if scores is None else scores[row],
        )
        for row, (parent, rollout) in enumerate(zip(parents, active))
    ]
