"""The latent of ``emoji-dit``: what each 4 x 4 pixels of a scene look like, and what they are.

A latent learnt on scenes with many sizes did not hold what an object is: in a pilot of 2,500
updates, linear heads read the class from 6% of an object's cells. So the latent is laid down. It
says background, colour and shape apart, so that a shape is the same in every colour and over every
background, and beside them a word of an error-correcting code for the class, and where in its
object a cell lies. So a picture and its meaning are denoised together (as by Kouzelis et al.,
"Boosting Generative Image Modeling via Joint Image-Feature Synthesis", 2025, arXiv:2504.16064), and
what a cell looks like depends on what that cell says. The decoder is trained to draw from the
latent, under noise; the encoder, to read it.

| channels | what, as means over 4 x 4 pixels |
|---|---|
| 0-2 | background: RGB in [0, 1] less .53, times 3; under objects too |
| 3-5 | mean colour of the object: RGB in [0, 1] less .5, times 3 |
| 6 | opacity, times 2 |
| 7 | opacity times (brightness less .5), times 3; brightness is the place on the colour's ramp |
| 8-10 | opacity times (RGB less the mean colour), times 4, of objects without a tint |
| 11-17 | class: one of 80 words |
| 18-19 | offset from the object's centre, across and down, in half sides |
| 20 | side of the object's cell, (side - 44) / 20 |
| 21-28 | sine and cosine of pi and 2 pi times each offset |

Channels from the fourth on are 0 on the background. Those from the twelfth on are louder, by
``LOUDNESS``: a sampler then finds what is where before it finds what that looks like. The waves are
for networks, which learn a picture slowly as a function of plain offsets (Tancik et al., "Fourier
Features Let Networks Learn High Frequency Functions in Low Dimensional Domains", 2020,
arXiv:2006.10739).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffalign.embedded.world.glyphs import RAMPS
from diffalign.embedded.world.scenes import Scene, stamp
from diffalign.embedded.world.vocabulary import NATIVE, OBJECTS

CHANNELS, STRIDE, LOOKS = 29, 4, 11
"""Numbers of a cell, its side in pixels, and how many of the numbers say what it looks like."""

LOUDNESS = 2.0
"""Scale of what a cell is; words have a norm and a least distance of 1.59 times this."""


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
    codes: npt.NDArray[np.float32] = table.astype(np.float32)
    return codes


def _blocks(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Means over squares of ``STRIDE`` pixels: [side, side, C] -> [C, side / 4, side / 4]."""
    count = len(pixels) // STRIDE
    means = pixels.reshape(count, STRIDE, count, STRIDE, -1).mean((1, 3))
    blocks: npt.NDArray[np.float32] = means.transpose(2, 0, 1).astype(np.float32)
    return blocks


@functools.cache
def looks(name: str, colour: str, side: int) -> npt.NDArray[np.float32]:
    """Channels 3 to 10 of an object, float32 [8, side / 4, side / 4]."""
    picture, dark = stamp(name, colour, side), stamp(name, "black", side)
    opacity, pixels = 1 - picture.clear, picture.colour / np.float32(255)
    mean = pixels.sum((0, 1)) / opacity.sum()
    low, high = (np.float32(end[0] / 255) for end in RAMPS["black"])
    place = (dark.colour[..., :1] / np.float32(255) - opacity * low) / (high - low)
    rest = pixels - opacity * mean if colour == NATIVE else np.zeros_like(pixels)
    table = np.concatenate(
        [np.broadcast_to(mean, pixels.shape), opacity, place - opacity / 2, rest], axis=2
    )
    scale = np.array([3, 3, 3, 2, 3, 4, 4, 4], dtype=np.float32)
    shift = np.array([0.5] * 3 + [0] * 5, dtype=np.float32)
    return (_blocks(table) - shift[:, None, None]) * scale[:, None, None]


def code(scene: Scene) -> npt.NDArray[np.float32]:
    """The latent of a scene, float32 [29, side / 4, side / 4].

    ValueError for a scene whose objects do not stand at multiples of 4 pixels.
    """
    assert scene.tones is not None
    if any(number % STRIDE for place in scene.layout for number in place):
        raise ValueError(
            f"scene: expected places at multiples of {STRIDE} pixels, got {scene.layout}; take"
            " scenes of the edition ALIGNED"
        )
    side = len(scene.image) // STRIDE
    latent = np.zeros((CHANNELS, side, side), dtype=np.float32)
    tones = scene.tones.repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)
    latent[:3] = (tones / 255 - 0.53) * 3
    for (x, y, length), thing in zip(scene.layout, scene.objects, strict=True):
        left, top, count = x // STRIDE, y // STRIDE, length // STRIDE
        cell = latent[:, top : top + count, left : left + count]
        cell[3:LOOKS] = looks(thing.name, thing.colour, length)
        cell[LOOKS:18] = class_words()[OBJECTS.index(thing.name)][:, None, None]
        offset = (np.arange(count) + 0.5) * 2 / count - 1
        across, down = offset[None, :], offset[:, None]
        cell[18], cell[19], cell[20] = across, down, (length - 44) / 20
        for k in (1, 2):
            for i, wave in enumerate((np.sin, np.cos)):
                cell[17 + 4 * k + i] = wave(np.pi * k * across)
                cell[19 + 4 * k + i] = wave(np.pi * k * down)
    latent[LOOKS:] *= LOUDNESS
    return latent


def codes(scenes: Sequence[Scene]) -> Tensor:
    """The latents of scenes of one size, float32 [B, 29, side / 4, side / 4]."""
    return torch.from_numpy(np.stack([code(scene) for scene in scenes]))
