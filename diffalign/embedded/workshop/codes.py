"""The latent of ``emoji-dit``: what each 4 x 4 pixels of a scene look like, and what they are.

A latent learnt on scenes with many sizes did not hold what an object is: in a pilot of 2,500
updates, linear heads read the class from 6% of an object's cells. So the latent is laid down. Its
first three channels are the picture itself, made smaller; the others are a word of an
error-correcting code for the class, and where in its object a cell lies. So a picture and its
meaning are denoised together (as by Kouzelis et al., "Boosting Generative Image Modeling via Joint
Image-Feature Synthesis", 2025, arXiv:2504.16064), and what a cell looks like depends on what that
cell says. The decoder is trained to draw from the latent, under noise; the encoder, to read it.

| channels | what |
|---|---|
| 0-2 | mean colour: RGB in [0, 1] less .53, times 3 |
| 3-9 | class: one of 80 words |
| 10-11 | offset from the object's centre, across and down, in half sides |
| 12 | side of the object's cell, (side - 44) / 20 |
| 13-20 | sine and cosine of pi and 2 pi times each offset |

Channels from the fourth on are 0 on the background and louder than the colours, by ``LOUDNESS``: a
sampler then finds what is where before it finds what that looks like.

The last eight are for networks, which learn a picture slowly as a function of plain offsets (Tancik
et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains",
2020, arXiv:2006.10739).
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
from diffalign.embedded.world.vocabulary import OBJECTS

CHANNELS, STRIDE = 21, 4
"""Numbers of a cell, and its side in pixels."""

LOUDNESS = 2.0
"""Scale of what is not colour; words have a norm and a least distance of 1.59 times this."""


@functools.cache
def class_words() -> npt.NDArray[np.float32]:
    """The words of the classes, float32 [80, 7]: roots of the lattice E7 (Conway and Sloane,
    "Sphere Packings, Lattices and Groups", 1999, chapter 4); norm and least distance are equal."""
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
    table = np.array(words[: len(OBJECTS)]) * np.sqrt(7) / 2 * 0.6
    return table.astype(np.float32)


def code(scene: Scene) -> npt.NDArray[np.float32]:
    """The latent of a scene, float32 [21, side / 4, side / 4]; where an object's cell does not end
    at multiples of 4 pixels, it has those squares whose centre lies in it."""
    side = len(scene.image) // STRIDE
    latent = np.zeros((CHANNELS, side, side), dtype=np.float32)
    blocks = scene.image.reshape(side, STRIDE, side, STRIDE, 3).mean((1, 3), dtype=np.float32)
    latent[:3] = (blocks.transpose(2, 0, 1) / 255 - 0.53) * 3
    for (x, y, length), thing in zip(scene.layout, scene.objects, strict=True):
        left, top = (-(-(start - STRIDE // 2) // STRIDE) for start in (x, y))
        right, low = (-(-(start + length - STRIDE // 2) // STRIDE) for start in (x, y))
        cell = latent[:, top:low, left:right]
        cell[3:10] = class_words()[OBJECTS.index(thing.name)][:, None, None]
        across, down = (
            (np.arange(*span) * STRIDE + STRIDE / 2 - start) / (length / 2) - 1
            for span, start in (((left, right), x), ((top, low), y))
        )
        cell[10], cell[11], cell[12] = across[None, :], down[:, None], (length - 44) / 20
        for k in (1, 2):
            for i, wave in enumerate((np.sin, np.cos)):
                cell[9 + 4 * k + i] = wave(np.pi * k * across)[None, :]
                cell[11 + 4 * k + i] = wave(np.pi * k * down)[:, None]
    latent[3:] *= LOUDNESS
    return latent


def codes(scenes: Sequence[Scene]) -> Tensor:
    """The latents of scenes of one size, float32 [B, 21, side / 4, side / 4]."""
    return torch.from_numpy(np.stack([code(scene) for scene in scenes]))
