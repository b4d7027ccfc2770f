"""Moving scenes of the embedded world: seeded clips with captions and exact truth.

A clip has 13 pictures of 64 x 64, the objects and backgrounds of the first edition of ``scenes``.
Every fourth picture, from the first on, is a **key picture**, and in key pictures all cells lie on
the grid of 8 pixels: an object that moves goes 2 pixels a picture, always in one direction, and one
that appears is there from the first picture after a key picture. So what stands between two key
pictures follows from them. Cells never overlap. Cost: about .1 ms a picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from diffalign.embedded.world.captions import Group
from diffalign.embedded.world.editions import FIRST
from diffalign.embedded.world.scenes import CELL, GRID, SIZE, Object, paste, rounded
from diffalign.embedded.world.stories import (
    DIRECTIONS,
    KINDS,
    Role,
    Story,
    drawn,
    falsified,
    retelling,
    telling,
)

FRAMES, KEYS, EVERY = 13, 4, 4
"""Pictures of a clip, key pictures among them, and pictures from one key picture to the next."""

SPEED = GRID // EVERY
"""Pixels that a moving object goes from one picture to the next."""

DEFAULT_MIX: dict[str, float] = {
    "still": 0.12, "colour": 0.17, "moving": 0.24, "moving_coloured": 0.14, "moving_and": 0.12,
    "beside": 0.11, "before": 0.10,
}  # fmt: skip
"""The mixture of kinds; weights need not add up to one."""


@dataclass(frozen=True)
class Actor:
    """An object of a clip: who, where and from when."""

    role: Role
    # corner of its cell in the first picture, in pixels
    place: tuple[int, int]
    # the first key picture that shows it; 0: there from the start
    entrance: int = 0

    def corner(self, frame: int) -> tuple[int, int] | None:
        """Corner of its cell in a picture, or None before it appears."""
        if frame <= EVERY * (self.entrance - 1):
            return None
        across, down = DIRECTIONS[self.role.motion] if self.role.motion else (0, 0)
        x, y = self.place
        return x + SPEED * frame * across, y + SPEED * frame * down


@dataclass(frozen=True)
class Clip:
    """A short film with its caption and truth; pictures are drawn when they are asked for."""

    caption: str
    # one of ``stories.KINDS``
    kind: str
    story: Story
    # in the order of the story's roles
    actors: tuple[Actor, ...]
    # float32 [64, 64, 3]
    background: npt.NDArray[np.float32]

    def shot(self, frame: int) -> tuple[npt.NDArray[np.uint8], tuple[Object | None, ...]]:
        """A picture, uint8 [64, 64, 3], and the truth of each actor in it, None before it appears.

        IndexError for a frame outside 0 to 12.
        """
        if not 0 <= frame < FRAMES:
            raise IndexError(f"frame: expected 0 to {FRAMES - 1}, got {frame}")
        canvas = self.background.copy()
        truth: list[Object | None] = []
        for actor in self.actors:
            corner = actor.corner(frame)
            group = Group(actor.role.name, 1, actor.role.colour)
            truth.append(None if corner is None else paste(canvas, group, (*corner, CELL)))
        return rounded(canvas), tuple(truth)

    def pictures(self, keys: bool = False) -> npt.NDArray[np.uint8]:
        """All 13 pictures, or the four key pictures: uint8 [T, 64, 64, 3]."""
        return np.stack([self.shot(frame)[0] for frame in range(0, FRAMES, EVERY if keys else 1)])


@dataclass(frozen=True)
class ClipWorld:
    """A stream of clips.

    Raises: ValueError for unknown kinds, negative weights or a mixture without weight.
    """

    # kind of story -> weight
    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    # share of captions in the plain grammar; the others are free wordings
    plain: float = 0.6

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.mix) - set(KINDS)):
            raise ValueError(
                f"ClipWorld(mix=...) must hold kinds among {', '.join(KINDS)}; got "
                f"{', '.join(unknown)}."
            )
        if min(self.mix.values(), default=0.0) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(
                f"ClipWorld(mix=...) must have weights >= 0 with a positive sum; got {self.mix}."
            )
        if not 0 <= self.plain <= 1:
            raise ValueError(f"ClipWorld(plain=...) must be a share in [0, 1]; got {self.plain}.")

    def clips(self, seed: int, count: int) -> Iterator[Clip]:
        """``count`` clips; a longer stream of the same seed begins like a shorter one."""
        rng = random.Random(seed)
        kinds, weights = list(self.mix), list(self.mix.values())
        for _ in range(count):
            kind = rng.choices(kinds, weights)[0]
            story = drawn(rng, kind)
            actors = staged(rng, story)
            plain = rng.random() < self.plain
            caption = telling(story) if plain else retelling(rng, story)
            yield Clip(caption, kind, story, actors, FIRST.background(rng))

    def wrong(self, seed: int, count: int) -> Iterator[tuple[Clip, Story]]:
        """Clips with a story each that is **false** for them in one fact."""
        rng = random.Random(seed + 7_919)
        for clip in self.clips(seed, count):
            yield clip, falsified(rng, clip.story)


def staged(rng: random.Random, story: Story) -> tuple[Actor, ...]:
    """Places and entrances for the roles of a story. Draws from ``rng``."""
    last = SIZE - CELL
    steps = range(0, last + 1, GRID)
    if story.event is not None:
        options = ((1, 0), (2, 0)) if story.event == "beside" else ((1, 2), (1, 3), (2, 3))
        entrances = rng.choice(options)
    else:
        entrances = (0, 0)
    places = [(x, y) for x, y, _ in FIRST.layout(rng, len(story.roles), None)]
    mover = next((i for i, role in enumerate(story.roles) if role.motion), None)
    if mover is not None:
        motion = story.roles[mover].motion
        assert motion is not None
        axis = 0 if DIRECTIONS[motion][0] else 1
        way, lane = SPEED * (FRAMES - 1), rng.choice((0, last))
        start = rng.choice(range(0, last - way + 1, GRID))
        if DIRECTIONS[motion][axis] < 0:
            start = last - start
        across = lane if len(places) > 1 else rng.choice(steps)
        places[mover] = (start, across) if axis == 0 else (across, start)
        if len(places) > 1:
            along = rng.choice(steps)
            places[1 - mover] = (along, last - lane) if axis == 0 else (last - lane, along)
    return tuple(
        Actor(role, place, entrance)
        for role, place, entrance in zip(story.roles, places, entrances, strict=False)
    )
