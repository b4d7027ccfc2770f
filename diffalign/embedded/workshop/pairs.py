"""Pairs of scenes that differ in one fact, for the contrastive training and the test of
``emoji-clip``.

Both scenes of a pair have the same background and, where the fact allows, the same layout; each
one's caption is a hard negative for the other, and each picture a hard negative for the other's
caption (the construction of Thrush et al., "Winoground", 2022, arXiv:2204.03162).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diffalign.embedded.world import scenes as w
from diffalign.embedded.world.captions import Group, geneval, paraphrase
from diffalign.embedded.world.editions import FIRST, Edition
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS, OPPOSITE, RELATIONS

LARGEST = 4
"""The largest number of objects of one class."""

CHANGES = ("class", "colour", "count", "relation", "binding")
"""What can differ. ``class``, ``colour`` and ``count`` change one group; ``relation`` replaces
the relation; ``binding`` exchanges two groups' colours or numbers and keeps every word of the
caption."""

MIX: dict[str, float] = {
    "single": 0.08, "colour": 0.12, "two": 0.13, "count": 0.15, "position": 0.17,
    "two_coloured": 0.22, "count_coloured": 0.03, "position_coloured": 0.04, "numbers": 0.04,
    "three": 0.02,
}  # fmt: skip
"""Kinds of scene in training; more of those in which a word has to find its object than in
``world.DEFAULT_MIX``."""


FOCUS: dict[str, float] = {
    "single": 0.03, "colour": 0.06, "two": 0.06, "count": 0.08, "position": 0.32,
    "two_coloured": 0.27, "count_coloured": 0.02, "position_coloured": 0.08, "numbers": 0.06,
    "three": 0.02,
}  # fmt: skip
"""The mixture once objects, colours and numbers are known: relation and binding."""


TURNED: dict[str, float] = {
    "two": 0.05, "count": 0.04, "position": 0.75, "two_coloured": 0.1, "position_coloured": 0.06,
}  # fmt: skip
"""The mixture of the drill in places."""


@dataclass(frozen=True)
class Picture:
    """One scene of a pair."""

    scene: w.Scene
    # int64 [most, 6] as in ``World.arrays``
    truth: npt.NDArray[np.int64]

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """uint8 [side, side, 3]."""
        return self.scene.image

    @property
    def caption(self) -> str:
        """What the picture shows."""
        return self.scene.caption

    @property
    def groups(self) -> tuple[Group, ...]:
        """The objects that the caption states."""
        return self.scene.groups

    @property
    def relation(self) -> str | None:
        """The relation that the caption states."""
        return self.scene.relation


@dataclass(frozen=True)
class Pair:
    """Two pictures that differ in one fact."""

    first: Picture
    second: Picture
    # which fact, one of ``CHANGES``
    change: str


def pairs(
    seed: int,
    count: int,
    mix: dict[str, float] | None = None,
    plain: float = 0.6,
    weight: int = 3,
    turned: float = 0.0,
    edition: Edition = FIRST,
) -> Iterator[Pair]:
    """``count`` pairs from a seed; ``plain`` is the share whose captions are in GenEval's exact
    grammar, ``weight`` how often a relation or a binding is the change where it can be, against
    1 for the class and 2 for colour and number, ``turned`` the share of changed relations that
    become the opposite, the others being drawn from all."""
    rng = random.Random(seed)
    kinds, weights = zip(*(mix or MIX).items(), strict=True)
    for _ in range(count):
        kind = rng.choices(kinds, weights)[0]
        groups, relation = w.facts(rng, kind, edition)
        change = rng.choice(_possible(groups, relation, weight))
        others, other_relation = groups, relation
        if turned and relation and change == "relation" and rng.random() < turned:
            other_relation = OPPOSITE[relation]
        else:
            others, other_relation = _changed(rng, groups, relation, change, edition.most)
        background = edition.background(rng)
        layout = edition.layout(rng, _total(groups), relation)
        if change == "relation" and other_relation is not None:
            # The picture of the same two cells exchanged is the hardest; any other placement of the
            # relation keeps the pair honest.
            swapped = layout[::-1] if edition.allows(layout[::-1], other_relation) else None
            other_layout = swapped or edition.layout(rng, 2, other_relation)
        else:
            other_layout = (
                layout
                if len(layout) == _total(others)
                else edition.layout(rng, _total(others), None)
            )
        style = rng.random()
        captions = []
        for facts in ((groups, relation), (others, other_relation)):
            captions.append(geneval(*facts) if style < plain else paraphrase(rng, *facts))
        first = w.drawn(kind, captions[0], groups, relation, layout, background)
        second = w.drawn(kind, captions[1], others, other_relation, other_layout, background)
        yield Pair(_picture(first, edition.most), _picture(second, edition.most), change)


class Batch(NamedTuple):
    """Pairs in one piece, first and second pictures alternating."""

    # uint8 [N, side, side, 3]
    images: npt.NDArray[np.uint8]
    captions: list[str]
    # int64 [N, most, 6]
    truth: npt.NDArray[np.int64]
    # bool [N, N]: two different pictures with equal facts, so neither is a negative of the other
    same: npt.NDArray[np.bool_]
    scenes: list[w.Scene]


def batch(
    seed: int,
    count: int,
    mix: dict[str, float] | None = None,
    weight: int = 3,
    turned: float = 0.0,
    edition: Edition = FIRST,
) -> Batch:
    """The pictures of ``count`` pairs; the arguments are those of ``pairs``."""
    pictures = [
        picture
        for pair in pairs(seed, count, mix, weight=weight, turned=turned, edition=edition)
        for picture in (pair.first, pair.second)
    ]
    keys = [_key(picture) for picture in pictures]
    same = np.array([[i != j and a == b for j, b in enumerate(keys)] for i, a in enumerate(keys)])
    return Batch(
        np.stack([p.image for p in pictures]),
        [p.caption for p in pictures],
        np.stack([p.truth for p in pictures]),
        same,
        [p.scene for p in pictures],
    )


def _key(picture: Picture) -> tuple[frozenset[tuple[Group, int]], str | None]:
    """Facts up to the order of unrelated groups."""
    places = range(len(picture.groups)) if picture.relation else [0] * len(picture.groups)
    return frozenset(zip(picture.groups, places, strict=True)), picture.relation


def _total(groups: tuple[Group, ...]) -> int:
    return sum(group.count for group in groups)


def _possible(groups: tuple[Group, ...], relation: str | None, weight: int) -> list[str]:
    """Changes that these facts allow; the more specific ones several times, because every scene
    allows another class."""
    changes = ["class"]
    coloured = groups[0].colour != NATIVE
    if coloured:
        changes += ["colour"] * 2
    if max(group.count for group in groups) > 1 or len(groups) == 1:
        changes += ["count"] * 2
    if relation:
        changes += ["relation"] * weight
    if len(groups) == 2 and (
        groups[0].colour != groups[1].colour or groups[0].count != groups[1].count
    ):
        changes += ["binding"] * weight
    return changes


def _changed(
    rng: random.Random, groups: tuple[Group, ...], relation: str | None, change: str, most: int
) -> tuple[tuple[Group, ...], str | None]:
    """Facts that differ from the given ones in ``change`` alone."""
    result = list(groups)
    place = rng.randrange(len(groups))
    old = groups[place]
    if change == "relation":
        return groups, rng.choice([other for other in RELATIONS if other != relation])
    if change == "binding":
        a, b = groups
        if a.colour != b.colour:
            return (replace(a, colour=b.colour), replace(b, colour=a.colour)), relation
        return (replace(a, count=b.count), replace(b, count=a.count)), relation
    if change == "class":
        present = {group.name for group in groups}
        result[place] = replace(
            old, name=rng.choice([name for name in OBJECTS[1:] if name not in present])
        )
    elif change == "colour":
        present = {group.colour for group in groups}
        result[place] = replace(
            old, colour=rng.choice([colour for colour in COLOURS if colour not in present])
        )
    else:
        room = min(LARGEST, most - _total(groups) + old.count)
        choices = [number for number in range(1, room + 1) if number != old.count]
        if not choices:
            return _changed(rng, groups, relation, change, most)
        result[place] = replace(old, count=rng.choice(choices))
    return tuple(result), relation


def _picture(scene: w.Scene, most: int) -> Picture:
    truth = np.full((most, 6), -1, dtype=np.int64)
    for row, thing in enumerate(scene.objects):
        tint = COLOURS.index(thing.colour) if thing.colour != NATIVE else len(COLOURS)
        truth[row] = (OBJECTS.index(thing.name), tint, *thing.box)
    return Picture(scene, truth)
