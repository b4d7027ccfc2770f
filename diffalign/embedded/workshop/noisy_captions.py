"""Captions that leave a fact out or get one wrong, as the captions of photographs do.

A model of true captions hardly needs guidance: its own samples already follow the prompt. Captions
of the web describe a picture in part and sometimes falsely, so a model of them draws pictures that
follow the prompt in part, and guidance has work to do. ``CaptionNoise`` makes such captions of the
embedded world's scenes; the pictures stay as they are, and so does the grammar.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from diffalign.embedded.world.captions import Group, geneval, paraphrase
from diffalign.embedded.world.scenes import Scene, World
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS, OPPOSITE

OMISSIONS = ("object", "colour", "number", "relation")
"""What can be left out: one of several objects (with it the relation), a colour, a number above
one ("dogs" for "two dogs"), or the relation ("a cat and a dog")."""

ERRORS = ("class", "colour", "number", "relation")
"""What can be wrong: another object, another colour, another number (at most four objects in all),
the opposite relation."""


@dataclass(frozen=True)
class Statement:
    """The facts that a caption states, with at most one fault."""

    # a group of count 0 is a plural without a number
    groups: tuple[Group, ...]
    relation: str | None
    # the kind of fact that is left out, one of ``OMISSIONS``
    omission: str | None = None
    # the kind of fact that is wrong, one of ``ERRORS``
    error: str | None = None


@dataclass(frozen=True)
class CaptionNoise:
    """A share of the captions misses one fact, and another share has one wrong.

    The kind of fact is drawn evenly from those that the scene has. A caption without fault is the
    scene's own. ValueError unless both shares are in [0, 1] and add up to at most one.
    """

    # probability that one fact is left out, where the scene has one to spare: a single object
    # without colour or number has none, and its caption stays whole
    omission: float = 0.35
    # probability that one fact is wrong
    error: float = 0.15

    def __post_init__(self) -> None:
        for name, value in (("omission", self.omission), ("error", self.error)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"{name}: expected a probability in [0, 1], got {value}; pass e.g. 0.2"
                )
        if self.omission + self.error > 1:
            raise ValueError(
                f"omission: expected omission + error <= 1, got {self.omission} + {self.error};"
                " a caption has one fault at most, so lower one of them"
            )

    def statement(
        self, rng: random.Random, groups: tuple[Group, ...], relation: str | None
    ) -> Statement:
        """What a caption of these facts states. Draws from ``rng``."""
        place = rng.random()
        if place < self.omission:
            return _omitted(rng, groups, relation)
        if place < self.omission + self.error:
            return _mistaken(rng, groups, relation)
        return Statement(groups, relation)

    def caption(self, rng: random.Random, scene: Scene, plain: float) -> str:
        """A caption of ``scene``; ``plain`` is the share of faulty ones in GenEval's grammar."""
        statement = self.statement(rng, scene.groups, scene.relation)
        if statement.omission is None and statement.error is None:
            return scene.caption
        if rng.random() < plain:
            return geneval(statement.groups, statement.relation)
        return paraphrase(rng, statement.groups, statement.relation)


def arrays(
    world: World, noise: CaptionNoise, seed: int, count: int
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The pictures of ``world.arrays(seed, count)``, uint8 [count, side, side, 3], and a caption
    each, as ``told`` gives them."""
    scenes, captions = told(world, noise, seed, count)
    return np.stack([scene.image for scene in scenes]), captions


def told(world: World, noise: CaptionNoise, seed: int, count: int) -> tuple[list[Scene], list[str]]:
    """The scenes of ``world.scenes(seed, count)`` and a caption each.

    The faults come from a stream of their own, so the scenes are those of the same seed without
    noise. The same arguments give the same answer.
    """
    rng = random.Random(seed + 15_485_863)
    scenes = list(world.scenes(seed, count))
    return scenes, [noise.caption(rng, scene, world.plain) for scene in scenes]


def _omitted(rng: random.Random, groups: tuple[Group, ...], relation: str | None) -> Statement:
    """The facts without one of them, or whole where none can be spared."""
    options: dict[str, list[int]] = {
        "object": [place for place in range(len(groups)) if len(groups) > 1],
        "colour": [place for place, group in enumerate(groups) if group.colour != NATIVE],
        "number": [place for place, group in enumerate(groups) if group.count > 1],
        "relation": [0] if relation else [],
    }
    kinds = [kind for kind in OMISSIONS if options[kind]]
    if not kinds:
        return Statement(groups, relation)
    kind = rng.choice(kinds)
    place = rng.choice(options[kind])
    if kind == "relation":
        return Statement(groups, None, omission=kind)
    if kind == "object":
        return Statement(groups[:place] + groups[place + 1 :], None, omission=kind)
    group = groups[place]
    bare = replace(group, colour=NATIVE) if kind == "colour" else replace(group, count=0)
    return Statement(_with(groups, place, bare), relation, omission=kind)


def _mistaken(rng: random.Random, groups: tuple[Group, ...], relation: str | None) -> Statement:
    """The facts with one of them wrong."""
    options: dict[str, list[int]] = {
        "class": list(range(len(groups))),
        "colour": [place for place, group in enumerate(groups) if group.colour != NATIVE],
        "number": [place for place, group in enumerate(groups) if group.count > 1],
        "relation": [0] if relation else [],
    }
    kind = rng.choice([kind for kind in ERRORS if options[kind]])
    if kind == "relation" and relation is not None:
        return Statement(groups, OPPOSITE[relation], error=kind)
    place = rng.choice(options[kind])
    group = groups[place]
    if kind == "class":
        present = {other.name for other in groups}
        names = [name for name in OBJECTS[1:] if name not in present]
        false = replace(group, name=rng.choice(names))
    elif kind == "colour":
        present = {other.colour for other in groups}
        colours = [name for name in COLOURS if name not in present]
        false = replace(group, colour=rng.choice(colours))
    else:
        room = 4 - sum(other.count for other in groups) + group.count
        numbers = [number for number in range(1, room + 1) if number != group.count]
        false = replace(group, count=rng.choice(numbers))
    return Statement(_with(groups, place, false), relation, error=kind)


def _with(groups: tuple[Group, ...], place: int, group: Group) -> tuple[Group, ...]:
    """``groups`` with ``group`` at ``place``."""
    return (*groups[:place], group, *groups[place + 1 :])
