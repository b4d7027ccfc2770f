"""Captions of clips that leave a fact out or get one wrong, so that a model of them needs guidance:
what ``noisy_captions`` is for pictures."""

from __future__ import annotations

import random
from dataclasses import replace

from diffalign.embedded.workshop.noisy_captions import CaptionNoise
from diffalign.embedded.world.clips import Clip, ClipWorld
from diffalign.embedded.world.stories import Story, falsified, retelling, telling
from diffalign.embedded.world.vocabulary import NATIVE


def omitted(rng: random.Random, story: Story) -> Story:
    """The story without one of its facts: a colour, a motion, an event ("a cat and a clock"), or an
    object and the event with it. Whole where a single object is all there is."""
    options: list[Story] = []
    for i, role in enumerate(story.roles):
        before, after = story.roles[:i], story.roles[i + 1 :]
        if role.colour != NATIVE:
            roles = (*before, replace(role, colour=NATIVE), *after)
            options.append(replace(story, roles=roles))
        if role.motion is not None:
            roles = (*before, replace(role, motion=None), *after)
            options.append(replace(story, roles=roles))
        if len(story.roles) > 1:
            options.append(Story((*before, *after)))
    if story.event is not None:
        options.append(replace(story, event=None))
    return rng.choice(options) if options else story


def told(
    world: ClipWorld, noise: CaptionNoise, seed: int, count: int
) -> tuple[list[Clip], list[str]]:
    """The clips of ``world.clips(seed, count)`` and a caption each, with at most one fault.

    The faults come from a stream of their own, so the clips are those of the same seed without
    noise. The same arguments give the same answer.
    """
    rng = random.Random(seed + 15_485_863)
    clips, captions = list(world.clips(seed, count)), []
    for clip in clips:
        place = rng.random()
        if place >= noise.omission + noise.error:
            captions.append(clip.caption)
            continue
        change = omitted if place < noise.omission else falsified
        story = change(rng, clip.story)
        plain = rng.random() < world.plain
        captions.append(telling(story) if plain else retelling(rng, story))
    return clips, captions
