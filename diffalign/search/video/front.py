"""The videos of a Tree-of-Frames between two levels, and what has grown so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from diffalign.core.sampler import State, join
from diffalign.core.search import Candidate, Lineage, Move, Node, Problem, Stage, Tree
from diffalign.search.tree import thumbnail
from diffalign.search.video.sampler import names, numbered


@dataclass(frozen=True, slots=True)
class Twig:
    """A beginning of a video that was made, for the picture of the tree."""

    # index of the one that it continues, None for a first chunk
    parent: int | None
    # chunks
    step: int
    # numbers of its chunks among their siblings: "0.11.1"
    name: str
    # weighted sum of the rewards at its stage, NaN where nothing was chosen there
    value: float = math.nan
    # [3, h, w] uint8, its last frame; None where it was not decoded
    picture: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """The videos that grow, and every twig that was made."""

    # what each stage is scored against
    texts: Mapping[Stage, str]
    # None between two trees
    states: State | None = None
    lineages: tuple[Lineage, ...] = ()
    # the twig of each
    places: tuple[int, ...] = ()
    twigs: tuple[Twig, ...] = ()
    # trees that are over
    trees: int = 0
    # the best video, where ranks choose it, and the twig of the best one
    winner: Candidate | None = None
    best: int | None = None
    # scores of every whole video by each part of the reward, and which of them is the best
    whole: tuple[tuple[float, ...], ...] = ()
    leader: int | None = None

    def drawing(self) -> Tree | None:
        """The tree for a picture; None before anything can be shown."""
        continued = {twig.parent for twig in self.twigs}
        leaves = [
            i
            for i, twig in enumerate(self.twigs)
            if i not in continued and twig.picture is not None
        ]
        if not leaves:
            return None
        number = {leaf: i for i, leaf in enumerate(leaves)}
        nodes = [Node(None, 0, self._value(None), len(self.twigs), name="")]
        for i, twig in enumerate(self.twigs):
            parent = 0 if twig.parent is None else twig.parent + 1
            nodes.append(Node(parent, twig.step, self._value(i), 1, number.get(i), twig.name))
        way: list[int] = []
        place = self.best
        while place is not None:
            way.append(place + 1)
            place = self.twigs[place].parent
        pictures = tuple(self._picture(leaf) for leaf in leaves)
        return Tree(tuple(nodes), pictures, (0, *way[::-1]) if way else (), unit="chunks")

    def _picture(self, place: int) -> Tensor:
        picture = self.twigs[place].picture
        assert picture is not None
        return picture.float() / 255

    def _value(self, place: int | None) -> float:
        """Its own value, or the highest of what continues it."""
        if place is not None and not math.isnan(self.twigs[place].value):
            return self.twigs[place].value
        below = [i for i, twig in enumerate(self.twigs) if twig.parent == place]
        return max((v for i in below if not math.isnan(v := self._value(i))), default=math.nan)


@dataclass(frozen=True, slots=True)
class Round:
    """The videos of one level."""

    states: State
    lineages: tuple[Lineage, ...]
    # the twig that each continues, or that it is
    places: tuple[int | None, ...]

    def select(self, rows: Sequence[int]) -> Round:
        """Those of them."""
        return Round(
            self.states.select(rows),
            tuple(self.lineages[row] for row in rows),
            tuple(self.places[row] for row in rows),
        )


def roots(problem: Problem, front: Front, size: int) -> Round:
    """Videos before their first chunk; they are numbered on from those of earlier trees."""
    first = sum(twig.parent is None for twig in front.twigs)
    seeds = problem.seeds(size)
    states = numbered(problem.start(seeds), range(first, first + size))
    lineages = tuple(Lineage((Move(0, seed),), chunks=True) for seed in seeds)
    return Round(states, lineages, (None,) * size)


def children(problem: Problem, front: Front, width: int) -> Round:
    """Each kept video's own continuation, and ``width - 1`` others of each."""
    assert front.states is not None
    heads = numbered(front.states, [0] * len(front.places))
    if width == 1:
        return Round(heads, front.lineages, front.places)
    rows = [row for row in range(len(front.places)) for _ in range(width - 1)]
    seeds = problem.seeds(len(rows))
    numbers = [number for _ in front.places for number in range(1, width)]
    others = numbered(front.states.select(rows).reseed(seeds), numbers)
    step = front.states.step
    branches = [front.lineages[row].then(step, seed) for row, seed in zip(rows, seeds)]
    places = [front.places[row] for row in rows]
    return Round(join([heads, others]), (*front.lineages, *branches), (*front.places, *places))


def twigs_of(round_: Round) -> list[Twig]:
    """The videos of a level, run by a chunk, as twigs without values."""
    step = round_.states.step
    return [Twig(place, step, name) for place, name in zip(round_.places, names(round_.states))]


def valued(twigs: Sequence[Twig], values: Sequence[float], frames: Tensor) -> list[Twig]:
    """Twigs with values and with frames [B, 3, H, W] as their pictures."""
    return [
        replace(twig, value=value, picture=thumbnail(frame))
        for twig, value, frame in zip(twigs, values, frames, strict=True)
    ]
