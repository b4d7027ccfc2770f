"""The tree of a tree search: states of the branch levels, values, visits, and rules on them.

Nothing here runs a model. ``Grown`` is plain data that is saved with the run; ``Workspace`` is a
copy of it that one round changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from diffalign.core import Lineage, Node, State, Tensor, Tree
from diffalign.search.weights import Weighted

Backup = Literal["soft", "max"]
# longest side of the picture of a leaf that the tree keeps, in pixels
THUMBNAIL = 64
ROOT = 0
# generators of a kept state are never used: children get new ones
_UNUSED = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Rule:
    """How wide a tree grows: a state with ``n`` visits has at most ``width * n ** growth``
    children."""

    width: float
    growth: float
    # share of choices among children that are made at random
    uniform: float = 0.0

    def open(self, children: int, visits: int) -> bool:
        """Whether one more child may be drawn."""
        limit: float = self.width * visits**self.growth
        return children < limit


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that came to one level in one round."""

    state: State
    # [B, 3, h, w] uint8 of finished images
    pictures: Tensor | None = None

    @classmethod
    def of(cls, state: State, images: Sequence[Tensor] = ()) -> Batch:
        """What is worth keeping of a state: its latents and what its scheduler and techniques
        remember. ``images`` [3, H, W] in [0, 1]."""
        kept = replace(
            state, rng=(_UNUSED,) * len(state.latents), x0=None, transition=None, reseeded=False
        )
        return cls(kept, torch.stack([thumbnail(image) for image in images]) if images else None)


@dataclass(frozen=True, slots=True)
class Spot:
    """A state of the tree."""

    # index of the parent, -1 for the root
    parent: int
    # evaluations made; the root, at 0, stands for all noise
    step: int
    lineage: Lineage
    # index of the batch that holds it, and its row there
    batch: int = -1
    row: int = 0
    leaf: bool = False


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree between two rounds; parents stand before their children."""

    rule: Rule
    # evaluations at which states are kept, the first is 0
    levels: tuple[int, ...]
    # an image counts by exp(tilt * score)
    tilt: float = 1.0
    backup: Backup = "soft"
    spots: tuple[Spot, ...] = (Spot(-1, 0, Lineage(())),)
    children: tuple[tuple[int, ...], ...] = ((),)
    # score of a finished image; of others the soft mean ``log(mean(exp(tilt * v))) / tilt`` of
    # their children, which are equal draws of the model, or the largest; NaN before the first
    values: tuple[float, ...] = (math.nan,)
    visits: tuple[int, ...] = (1,)
    # log of the sums of the weights, and of their squares, of the images below each spot, where
    # a descent that begins there weighs them
    sums: tuple[float, ...] = (-math.inf,)
    squares: tuple[float, ...] = (-math.inf,)
    batches: tuple[Batch, ...] = ()
    # finished images
    images: int = 0
    # lowest and highest score
    range: tuple[float, float] = (math.inf, -math.inf)

    @property
    def effective(self) -> float:
        """``(sum W)^2 / sum W^2`` of ``weighted``."""
        return math.exp(2 * self.sums[ROOT] - self.squares[ROOT])

    @property
    def log_evidence(self) -> float:
        """Log of the estimate of Z."""
        return self.sums[ROOT]

    @property
    def leaves(self) -> list[int]:
        """Indices of finished images, in the order in which they were made."""
        return [i for i, spot in enumerate(self.spots) if spot.leaf]

    def state(self, index: int) -> State:
        """The state of one image; the root has none."""
        spot = self.spots[index]
        return self.batches[spot.batch].state.select([spot.row])

    def path(self, index: int) -> list[int]:
        """From the root to a spot."""
        way = [index]
        while way[-1] != ROOT:
            way.append(self.spots[way[-1]].parent)
        return way[::-1]

    def weighted(self) -> Weighted:
        """The leaves with the weights of a descent that takes each child by ``exp(tilt * value)``.

        With the soft backup the probabilities of the descent telescope to ``log W = tilt * score -
        sum log(children of each state above)``, and the sum of all W is the estimate of Z.
        """
        logs = [0.0] * len(self.spots)
        for i in range(1, len(self.spots)):
            above = self.spots[i].parent
            logs[i] = logs[above] - math.log(len(self.children[above]))
        leaves = self.leaves
        scores = torch.tensor([self.values[i] for i in leaves], dtype=torch.float64)
        shares = torch.tensor([logs[i] for i in leaves], dtype=torch.float64)
        return Weighted(scores, self.tilt * scores + shares, self.log_evidence)

    def greedy(self) -> list[int]:
        """The descent that takes the child of highest value, from the root to a leaf."""
        way = [ROOT]
        while self.children[way[-1]]:
            way.append(max(self.children[way[-1]], key=self.values.__getitem__))
        return way

    def drawing(self) -> Tree:
        """What a picture of the tree needs; its path leads to the best finished image."""
        leaves = self.leaves
        number = {leaf: i for i, leaf in enumerate(leaves)}
        nodes = tuple(
            Node(
                parent=spot.parent if spot.parent >= 0 else None,
                step=spot.step,
                value=self.values[i],
                visits=self.visits[i],
                image=number.get(i),
            )
            for i, spot in enumerate(self.spots)
        )
        images = tuple(self.picture(leaf) for leaf in leaves)
        best = max(leaves, key=self.values.__getitem__, default=None)
        return Tree(nodes, images, () if best is None else tuple(self.path(best)))

    def picture(self, leaf: int) -> Tensor:
        """A small picture [3, h, w] in [0, 1] of a finished image."""
        spot = self.spots[leaf]
        pictures = self.batches[spot.batch].pictures
        if pictures is None:
            raise ValueError(f"Spot {leaf} is not a finished image.")
        return pictures[spot.row].float() / 255


@dataclass(slots=True)
class Workspace:
    """A copy of a tree that one round changes; ``frozen`` gives the next tree."""

    tree: Grown
    spots: list[Spot] = field(init=False)
    children: list[tuple[int, ...]] = field(init=False)
    values: list[float] = field(init=False)
    visits: list[int] = field(init=False)
    sums: list[float] = field(init=False)
    squares: list[float] = field(init=False)
    batches: list[Batch] = field(init=False)
    # spot -> children on their way, which have no value yet but count as children
    pending: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tree = self.tree
        self.spots, self.children = list(tree.spots), list(tree.children)
        self.values, self.visits = list(tree.values), list(tree.visits)
        self.sums, self.squares = list(tree.sums), list(tree.squares)
        self.batches = list(tree.batches)

    def opens(self, index: int) -> bool:
        """Whether the next visit of a spot draws a child of it.

        Where all children are on their way there is none to descend to, so one more is drawn even
        above the rule: this keeps the first batches full.
        """
        known = self.children[index]
        count = len(known) + self.pending.get(index, 0)
        return not known or self.tree.rule.open(count, self.visits[index])

    def visit(self, way: Sequence[int], times: int = 1) -> None:
        """Count a visit along a path before its rollout has come back; -1 takes it back."""
        for index in way:
            self.visits[index] += times

    def attach(self, spot: Spot, score: float = math.nan) -> int:
        """Add a spot below its parent; returns its index. ``score``: of a finished image.

        A state that a rollout passed has been visited twice: when it was made and by that rollout.
        """
        index = len(self.spots)
        self.spots.append(spot)
        self.children.append(())
        self.children[spot.parent] += (index,)
        self.values.append(score)
        self.visits.append(1 if spot.leaf else 2)
        self.sums.append(self.tree.tilt * score)
        self.squares.append(2 * self.tree.tilt * score)
        return index

    def back_up(self, leaves: Sequence[int]) -> None:
        """New values of every spot above these leaves, deepest first."""
        above: set[int] = set()
        for leaf in leaves:
            index = self.spots[leaf].parent
            while index >= 0 and index not in above:
                above.add(index)
                index = self.spots[index].parent
        for index in sorted(above, key=lambda i: (-self.spots[i].step, i)):
            children = self.children[index]
            count = math.log(len(children))
            self.sums[index] = _log_sum(self.sums, children) - count
            self.squares[index] = _log_sum(self.squares, children) - 2 * count
            self.values[index] = (
                max(self.values[child] for child in children)
                if self.tree.backup == "max"
                else self.sums[index] / self.tree.tilt
            )

    def frozen(self, scores: Sequence[float]) -> Grown:
        """The tree after the round. ``scores``: of the images that it finished."""
        low, high = self.tree.range
        return replace(
            self.tree,
            spots=tuple(self.spots),
            children=tuple(self.children),
            values=tuple(self.values),
            visits=tuple(self.visits),
            sums=tuple(self.sums),
            squares=tuple(self.squares),
            batches=tuple(self.batches),
            images=self.tree.images + len(scores),
            range=(min((low, *scores)), max((high, *scores))),
        )


def _log_sum(values: Sequence[float], places: Sequence[int]) -> float:
    """Log of the sum of ``exp`` of the values at these places."""
    terms = np.array([values[place] for place in places])
    high = float(terms.max())
    return high + math.log(float(np.exp(terms - high).sum()))


def thumbnail(image: Tensor) -> Tensor:
    """A picture [3, H, W] in [0, 1] as uint8 [3, h, w] with a longest side of at most 64."""
    side = max(image.shape[1:])
    if side > THUMBNAIL:
        size = [max(1, round(n * THUMBNAIL / side)) for n in image.shape[1:]]
        image = torch.nn.functional.interpolate(image[None], size, mode="area")[0]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def branch_levels(count: int, levels: int) -> tuple[int, ...]:
    """Evenly spaced evaluations at which a trajectory of ``count`` may branch, noise included.

    The state before the last evaluation is never one: that step adds no noise, so its children
    would be alike.
    """
    places = {round(i * count / levels) for i in range(levels)}
    return tuple(sorted({0} | {place for place in places if place < count - 1}))
