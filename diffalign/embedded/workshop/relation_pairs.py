"""Pairs of scenes whose two objects have exchanged their places, for a lesson in relations.

Which object belongs where is a parity of three facts: the relation word, the order of the names and
the place. No single one of them tells anything, so a denoiser finds no way in: after 14,000 updates
of ``emoji`` on ordinary scenes its loss was the same under a relation and its opposite. Two changes
open the way, and neither touches the world:

- at first every sentence says "left of" or "above", so that the first name means the left or the
  upper place; then more and more of them say "right of" and "below", up to half of all;
- both pictures of a pair share background, noise and step (by the caller), so that in the sum of
  their gradients all cancels that is not about the places.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from diffalign.embedded.world.captions import geneval
from diffalign.embedded.world.editions import FIRST, Edition
from diffalign.embedded.world.scenes import Scene, drawn, facts
from diffalign.embedded.world.vocabulary import OPPOSITE

FORWARD = ("left of", "above")
"""The relations in which the first name stands first as one reads."""


def leading(place: float) -> float:
    """The share of pairs told by ``FORWARD`` relations at ``place`` in [0, 1] of the lesson: 1
    until .3, then linearly down to .5 at .6."""
    return min(1.0, max(0.5, 1.0 - (place - 0.3) / 0.6))


def scenes(seed: int, count: int, forward: float, edition: Edition = FIRST) -> list[Scene]:
    """``count`` pairs of position scenes, the scenes of a pair one after the other, with captions
    in GenEval's grammar.

    The second scene is the first with the two objects exchanged. Both captions of a pair use
    ``FORWARD`` relations with probability ``forward``, else the opposite ones, and name the objects
    in the order that makes them true. ValueError unless ``forward`` is in [0, 1].
    """
    if not 0 <= forward <= 1:
        raise ValueError(f"forward: expected a share in [0, 1], got {forward}; pass e.g. 0.5")
    rng = random.Random(seed + 32_452_843)
    result = []
    for _ in range(count):
        groups, relation = facts(rng, "position")
        assert relation is not None
        background = edition.background(rng)
        layout = edition.layout(rng, 2, relation)
        along = rng.random() < forward
        for fact, places in ((relation, layout), (OPPOSITE[relation], layout[::-1])):
            agrees = (fact in FORWARD) == along
            wording = (groups, fact) if agrees else (groups[::-1], OPPOSITE[fact])
            result.append(drawn("position", geneval(*wording), groups, fact, places, background))
    return result


def arrays(seed: int, count: int, forward: float) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The pictures of ``scenes``, uint8 [2 count, 64, 64, 3], and their captions."""
    result = scenes(seed, count, forward)
    return np.stack([scene.image for scene in result]), [scene.caption for scene in result]
