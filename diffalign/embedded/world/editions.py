"""The two editions of the embedded world: how large a scene is, where its objects may stand and
what lies behind them.

Names, colours, relations, numbers and captions are those of ``vocabulary`` and ``captions`` in
both. The first edition is small and regular; the second has four times as many pixels, objects of
six sizes at any pixel, up to five of them, and coloured backgrounds, half of them of two tones.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Place = tuple[int, int, int]
"""The cell of an object: x and y of its corner, and its side, in pixels."""

Layout = tuple[Place, ...]

PAIRS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""Numbers of two kinds of objects in a scene of at most four."""


@dataclass(frozen=True)
class Edition:
    """What a scene looks like, beside what it says."""

    name: str
    # side of a picture, in pixels
    side: int
    # number of objects in the scene -> sides that their cells can have; a picture of an object
    # fills its cell but for one pixel on every side
    cells: Mapping[int, tuple[int, ...]]
    # step of the places, in pixels; 1: any pixel
    grid: int
    # how many objects of each of two kinds, where a scene tells both numbers
    numbers: tuple[tuple[int, int], ...] = PAIRS
    # range of the brightest channel of a background, of 255
    value: tuple[float, float] = (110.0, 195.0)
    # largest saturation of a background
    saturation: float = 0.22
    # share of the backgrounds that have two tones, divided by a straight line
    two_tone: float = 0.0
    # largest offset across a relation's axis, as a share of the offset along it
    slant: float = 0.5

    @property
    def most(self) -> int:
        """The largest number of objects in a scene."""
        return max(self.cells)

    @property
    def regular(self) -> bool:
        """Whether all objects have one size, so that the layouts can be listed."""
        return len({side for sides in self.cells.values() for side in sides}) == 1

    def layout(self, rng: random.Random, count: int, relation: str | None) -> Layout:
        """Places of ``count`` objects whose cells do not overlap, drawn from ``rng``.

        With a ``relation`` (then ``count`` is 2) the first object stands in it to the second, and
        GenEval's rule holds; its opposite does not.
        """
        if self.regular:
            table = related(self, relation) if relation else layouts(self, count)
            return rng.choice(table)
        while True:
            places = _free(rng, self, count)
            if places is None:
                continue
            if relation is None or _holds(places, relation, self.slant):
                return places

    def allows(self, layout: Layout, relation: str) -> bool:
        """Whether two cells stand in ``relation`` as a scene of this edition has them."""
        if self.regular:
            return layout in related(self, relation)
        return _holds(layout, relation, self.slant)

    def background(self, rng: random.Random) -> npt.NDArray[np.float32]:
        """A background with a vertical gradient of at most 24 grey levels: float32 [side, side,
        3]."""
        tone = self._tone(rng)
        if self.two_tone == 0 or rng.random() >= self.two_tone:
            return tone
        return tone + _half(rng, self.side) * (self._tone(rng) - tone)

    def _tone(self, rng: random.Random) -> npt.NDArray[np.float32]:
        value, slope = rng.uniform(*self.value), rng.uniform(-12, 12)
        hue, saturation = rng.random(), rng.uniform(0, self.saturation)
        shade = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0), dtype=np.float32)
        ramp = np.linspace(value - slope, value + slope, self.side, dtype=np.float32)
        return np.repeat((ramp[:, None] * shade)[:, None, :], self.side, axis=1)


FIRST = Edition("first", side=64, cells=dict.fromkeys((1, 2, 3, 4), (32,)), grid=8)
"""64 x 64: one size of object on a grid, grey backgrounds, up to four objects."""

SECOND = Edition(
    "second",
    side=128,
    cells={
        1: (40, 48, 56, 64),
        2: (32, 40, 48, 56),
        3: (24, 32, 40, 48),
        4: (24, 32, 40),
        5: (24, 32, 40),
    },
    grid=1,
    numbers=(*PAIRS, (2, 3), (3, 2), (1, 4), (4, 1)),
    value=(95.0, 215.0),
    saturation=0.5,
    two_tone=0.5,
)
"""128 x 128: six sizes at any pixel, coloured and two-tone backgrounds, up to five objects."""

ALIGNED = replace(SECOND, name="aligned", grid=8)
"""The scenes of the second edition whose places are multiples of 8 pixels, the stride of the
autoencoders: a cell of the latent is then wholly inside a cell of an object, or wholly outside."""

CLOSE = replace(
    ALIGNED,
    name="close",
    side=64,
    cells={1: (24, 32, 40, 48, 56, 64), 2: (24, 32), 3: (24,), 4: (24,)},
    numbers=PAIRS,
)
"""Aligned scenes on a quarter of the canvas, mostly object, for the training of an autoencoder, to
which it makes no difference."""

EDITIONS: dict[str, Edition] = {
    edition.name: edition for edition in (FIRST, SECOND, ALIGNED, CLOSE)
}
"""Name -> edition."""

AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Relation -> its axis (0: x) and the sign of the first object's offset from the second."""


def _disjoint(first: Place, second: Place) -> bool:
    return any(
        first[axis] + first[2] <= second[axis] or second[axis] + second[2] <= first[axis]
        for axis in (0, 1)
    )


def _hashed(edition: Edition) -> tuple[int, int, int]:
    (side,) = edition.cells[1]
    return edition.side, side, edition.grid


def layouts(edition: Edition, count: int) -> tuple[Layout, ...]:
    """All ordered placements of ``count`` disjoint cells on the grid of an edition of one size."""
    return _layouts(*_hashed(edition), count)


def related(edition: Edition, relation: str) -> tuple[Layout, ...]:
    """Placements of (subject, target) on the grid whose centres differ by at least one cell along
    the relation's axis and at most half a cell across it."""
    return _related(*_hashed(edition), relation)


@functools.cache
def _layouts(side: int, cell: int, grid: int, count: int) -> tuple[Layout, ...]:
    steps = range(0, side - cell + 1, grid)
    places = [(x, y, cell) for x, y in itertools.product(steps, steps)]
    partial: list[Layout] = [()]
    for _ in range(count):
        partial = [
            (*layout, place)
            for layout in partial
            for place in places
            if all(_disjoint(place, other) for other in layout)
        ]
    return tuple(partial)


@functools.cache
def _related(side: int, cell: int, grid: int, relation: str) -> tuple[Layout, ...]:
    axis, sign = AXES[relation]
    return tuple(
        (subject, target)
        for subject, target in _layouts(side, cell, grid, 2)
        if (subject[axis] - target[axis]) * sign >= cell
        and abs(subject[1 - axis] - target[1 - axis]) <= cell // 2
    )


def _free(rng: random.Random, edition: Edition, count: int) -> Layout | None:
    """Sizes and places of ``count`` objects, each tried twenty times; None where one finds no
    room."""
    places: list[Place] = []
    for _ in range(count):
        cell = rng.choice(edition.cells[count])
        for _ in range(20):
            span = (edition.side - cell) // edition.grid
            x, y = (edition.grid * rng.randint(0, span) for _ in range(2))
            place = (x, y, cell)
            if all(_disjoint(place, other) for other in places):
                places.append(place)
                break
        else:
            return None
    return tuple(places)


def _holds(places: Layout, relation: str, slant: float) -> bool:
    """Whether the first cell stands in ``relation`` to the second: apart along its axis, and across
    it by at most ``slant`` of that offset."""
    axis, sign = AXES[relation]
    first, second = ([place[i] + place[2] / 2 for i in (0, 1)] for place in places)
    along = (first[axis] - second[axis]) * sign
    across = abs(first[1 - axis] - second[1 - axis])
    return along >= (places[0][2] + places[1][2]) / 2 and across <= slant * along


def _half(rng: random.Random, side: int) -> npt.NDArray[np.float32]:
    """1 on one side of a random straight line, 0 on the other, one pixel of ramp between: float32
    [side, side, 1]. The line passes within a quarter of the side from the centre."""
    angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25) * side
    ticks = np.arange(side, dtype=np.float32) - (side - 1) / 2
    distance = math.cos(angle) * ticks[None, :] + math.sin(angle) * ticks[:, None] - offset
    return np.clip(distance + 0.5, 0, 1).astype(np.float32)[..., None]
