"""Pairs of clips that differ in one word, for a lesson in directions and in the order of events.

After 7,800 updates of ``emoji-video`` on ordinary clips the words for the four directions were one
word to it: its loss was the same under a direction and its opposite, to .0002. What a direction
says is news in two of four chunks alone, in the first (where an object starts) and in the second,
and each time half of the picture's other facts weigh more. So here both clips of a pair show one
object over one background, told by one sentence with another direction; noise and steps are shared
too (by the caller). In the sum of their gradients all cancels that is not about the word.

- A quarter of the pairs go two ways from one place, across and down or up: the second chunk tells
  the words apart, which is learnt within 700 updates.
- The others start apart: the first chunk does, which takes longer, since a direction leaves open
  where along the edge. So at first they start in the middle of an edge and go through the middle,
  and later they go opposite ways from any places that mirror each other.
- Pairs of events are two objects whose roles in the sentence are exchanged.
"""

from __future__ import annotations

import random
from dataclasses import replace

from diffalign.embedded.world.clips import Actor, Clip, staged
from diffalign.embedded.world.editions import FIRST
from diffalign.embedded.world.scenes import CELL, GRID, SIZE
from diffalign.embedded.world.stories import (
    DIRECTIONS,
    EVENTS,
    Story,
    drawn,
    retelling,
    telling,
)

OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}
APART = 0.75
"""Share of pairs that start apart."""
HALF = (SIZE - CELL) // 2
"""An object that goes right or down starts before this corner, one that goes left or up behind."""


def _open(place: tuple[int, int]) -> list[str]:
    """The directions with room for a whole way from a place."""
    return [
        word
        for word, signs in DIRECTIONS.items()
        if any(
            sign and (sign > 0) == (corner < HALF)
            for sign, corner in zip(signs, place, strict=True)
        )
    ]


Telling = tuple[str, Story, tuple[Actor, ...]]
"""Kind, story and actors of a clip."""


def _edge(word: str) -> tuple[int, int]:
    """Where an object starts that goes through the middle from one edge towards the other."""
    x, y = (HALF * (1 - sign) for sign in DIRECTIONS[word])
    return x, y


def _moving(rng: random.Random, wide: float) -> list[Telling]:
    """One object that goes two ways from one place, or different ways from places of their own;
    ``wide``: the probability that those are any that mirror each other, else they are edges."""
    last = SIZE - CELL
    # from the middle there is no room for a whole way
    steps = [step for step in range(0, last + 1, GRID) if step != HALF]
    kind = rng.choice(("moving", "moving", "moving_coloured"))
    story = drawn(rng, kind)
    x, y = rng.choice(steps), rng.choice(steps)
    words = _open((x, y))
    rng.shuffle(words)
    places = [(x, y), (x, y)]
    apart = rng.random() < APART
    if apart and rng.random() < wide:
        across = DIRECTIONS[words[0]][0] != 0
        words[1] = OPPOSITES[words[0]]
        places[1] = (last - x, y) if across else (x, last - y)
    elif apart:
        words = rng.sample(list(DIRECTIONS), 2)
        places = [_edge(word) for word in words]
    roles = [replace(story.roles[0], motion=word) for word in words]
    return [
        (kind, replace(story, roles=(role,)), (Actor(role, place),))
        for role, place in zip(roles, places, strict=True)
    ]


def _met(rng: random.Random) -> list[Telling]:
    """Two objects that appear one beside or before the other, and with their roles exchanged."""
    kind = rng.choice(EVENTS)
    story = drawn(rng, kind)
    first, second = staged(rng, story)
    reverse = replace(story, roles=story.roles[::-1])
    actors = (replace(first, role=second.role), replace(second, role=first.role))
    return [(kind, story, (first, second)), (kind, reverse, actors)]


def pairs(
    seed: int, count: int, plain: float, events: float = 0.0, wide: float = 1.0
) -> list[Clip]:
    """``count`` pairs of clips, the clips of a pair one after the other.

    ``plain``: share of pairs in the plain grammar, the others are worded freely, both alike.
    ``events``: share of pairs about the order of events. ``wide``: of those that start apart, the
    share that starts anywhere and not in the middle of an edge. The same arguments give the same
    clips. ValueError unless all three are in [0, 1].
    """
    for name, share in (("plain", plain), ("events", events), ("wide", wide)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {share}; pass e.g. 0.5")
    rng = random.Random(seed + 49_979_687)
    result: list[Clip] = []
    for _ in range(count):
        wording = rng.random() if rng.random() >= plain else None
        background = FIRST.background(rng)
        pair = _met(rng) if rng.random() < events else _moving(rng, wide)
        for kind, story, actors in pair:
            text = telling(story)
            if wording is not None:
                text = retelling(random.Random(wording), story)
            result.append(Clip(text, kind, story, actors, background))
    return result
