"""The latent of ``emoji-dit``: what each 8 x 8 pixels of a scene show, as sixteen numbers.

A latent learnt on scenes with many sizes did not hold what an object is: in a pilot of 2,500
updates, linear heads read the class from 6% of an object's cells. So the latent is laid down, in
the way of an error-correcting code: words far apart for the classes and the colours, and smooth
numbers for the rest. The decoder is trained to draw from it, under noise; the encoder, to read it.

| channels | on an object | on the background |
|---|---|---|
| 0-6 | class, one of 80 words at least 2.6 apart | 0 |
| 7-9 | colour, one of 11 words at least 1.7 apart | 0 |
| 10-11 | offset from the object's centre, in half sides, times 1.7 | 0 |
| 12 | side of the object's cell, (side - 44) / 13 | 0 |
| 13-15 | background: RGB in [0, 1] less .53, times 5 | the same |
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffalign.embedded.world.scenes import Scene
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS

CHANNELS, STRIDE = 16, 8
"""Numbers of a cell, and its side in pixels."""


@functools.cache
def class_words() -> npt.NDArray[np.float32]:
    """The words of the classes, float32 [80, 7]: roots of the lattice E7 (Conway and Sloane,
    "Sphere Packings, Lattices and Groups", 1999, chapter 4), of norm and least distance 2.65."""
    lines = [{0, 1, 2}, {0, 3, 4}, {0, 5, 6}, {1, 3, 5}, {1, 4, 6}, {2, 3, 6}, {2, 4, 5}]
    words = []
    for even in (True, False):
        for signs in itertools.product((1, -1), repeat=4):
            if (signs.count(-1) % 2 == 0) != even:
                continue
            for line in lines:
                word = np.zeros(7)
                word[sorted(set(range(7)) - line)] = signs
                words.append(word)
    table: npt.NDArray[np.float32] = (np.array(words[: len(OBJECTS)]) * np.sqrt(7) / 2).astype(
        np.float32
    )
    return table


@functools.cache
def colour_words() -> npt.NDArray[np.float32]:
    """The words of the ten colours and native, float32 [11, 3]: corners of a cuboctahedron, of norm
    and least distance 1.73."""
    corners = sorted(
        point for point in itertools.product((-1, 0, 1), repeat=3) if point.count(0) == 1
    )
    table: npt.NDArray[np.float32] = (np.array(corners[: len(COLOURS) + 1]) * np.sqrt(1.5)).astype(
        np.float32
    )
    return table


def code(scene: Scene) -> npt.NDArray[np.float32]:
    """The latent of a scene, float32 [16, side / 8, side / 8].

    Where cells of objects do not end at multiples of 8 pixels, an object has those cells of the
    latent whose centre lies in it.
    """
    assert scene.tones is not None
    side = len(scene.tones)
    latent = np.zeros((CHANNELS, side, side), dtype=np.float32)
    latent[13:] = (scene.tones.transpose(2, 0, 1) / 255 - 0.53) * 5
    centres = np.arange(side) * STRIDE + STRIDE / 2
    for (x, y, length), thing in zip(scene.layout, scene.objects, strict=True):
        across, down = ((centres - start - length / 2) / (length / 2) for start in (x, y))
        columns, rows = (np.flatnonzero(np.abs(offset) < 1) for offset in (across, down))
        cell = latent[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        colour = COLOURS.index(thing.colour) if thing.colour != NATIVE else len(COLOURS)
        cell[:7] = class_words()[OBJECTS.index(thing.name)][:, None, None]
        cell[7:10] = colour_words()[colour][:, None, None]
        cell[10], cell[11] = 1.7 * across[columns][None, :], 1.7 * down[rows][:, None]
        cell[12] = (length - 44) / 13
    return latent


def codes(scenes: Sequence[Scene]) -> Tensor:
    """The latents of scenes of one size, float32 [B, 16, side / 8, side / 8]."""
    return torch.from_numpy(np.stack([code(scene) for scene in scenes]))
