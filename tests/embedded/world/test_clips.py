"""The truth of clips against their pixels, and their grammar against sentences written by hand."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from diffalign.embedded.world.captions import words
from diffalign.embedded.world.clips import EVERY, FRAMES, KEYS, Clip, ClipWorld
from diffalign.embedded.world.scenes import CELL, SIZE
from diffalign.embedded.world.stories import (
    DIRECTIONS,
    KINDS,
    Role,
    Story,
    drawn,
    falsified,
    reading,
    retelling,
    story_words,
    telling,
)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(ClipWorld().clips(1_000_000, 200))


def test_a_seed_fixes_the_stream_and_a_longer_stream_begins_alike(clips: list[Clip]) -> None:
    again = list(ClipWorld().clips(1_000_000, 20))
    for a, b in zip(again, clips, strict=False):
        assert (a.caption, a.kind, a.story, a.actors) == (b.caption, b.kind, b.story, b.actors)
        assert (a.background == b.background).all()
    assert {clip.kind for clip in clips} == set(KINDS)


@pytest.mark.parametrize(
    ("caption", "story"),
    [
        ("a photo of a dog", Story((Role("dog"),))),
        ("a photo of an orange orange", Story((Role("orange", "orange"),))),
        (
            "a photo of a dog moving left and a red apple",
            Story((Role("dog", motion="left"), Role("apple", "red"))),
        ),
        (
            "a photo of a cat that appears beside a clock",
            Story((Role("cat"), Role("clock")), "beside"),
        ),
        (
            "a photo of a white traffic light that appears before a hot dog",
            Story((Role("traffic light", "white"), Role("hot dog")), "before"),
        ),
    ],
)
def test_sentences_and_facts(caption: str, story: Story) -> None:
    assert telling(story) == caption
    assert reading(caption) == story


def test_reading_is_the_inverse_of_telling(clips: list[Clip]) -> None:
    assert all(reading(telling(clip.story)) == clip.story for clip in clips)


@pytest.mark.parametrize("caption", ["", "a photo of two dogs", "a photo of a dog moving away"])
def test_reading_refuses_other_sentences(caption: str) -> None:
    with pytest.raises(ValueError, match="prompt: expected a sentence like"):
        reading(caption)


def test_every_word_is_known(clips: list[Clip]) -> None:
    rng, known = random.Random(3), set(story_words())
    for clip in clips:
        assert set(words(clip.caption)) <= known
        assert set(words(telling(clip.story))) <= known
        assert len(words(retelling(rng, clip.story))) <= 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_story_has_the_facts_of_its_kind(kind: str) -> None:
    rng = random.Random(5)
    for _ in range(50):
        story = drawn(rng, kind)
        assert len(story.roles) == (2 if kind in ("moving_and", "beside", "before") else 1)
        assert (story.roles[0].motion is not None) == kind.startswith("moving")
        assert story.event == (kind if kind in ("beside", "before") else None)
        assert all(role.colour == "native" for role in story.roles if role.name == "person")


def test_a_false_story_differs_in_one_fact() -> None:
    rng = random.Random(7)
    for clip, false in ClipWorld().wrong(1_000_100, 200):
        if false.roles == clip.story.roles[::-1] and len(false.roles) == 2:
            assert false.event == clip.story.event is not None
            continue
        changes = [
            (name, old, new)
            for a, b in zip(clip.story.roles, false.roles, strict=True)
            for name in ("name", "colour", "motion")
            for old, new in [(getattr(a, name), getattr(b, name))]
            if old != new
        ]
        assert len(changes) == 1
        assert false.event == clip.story.event
        assert falsified(rng, false) != false


def test_key_pictures_lie_on_the_grid_and_cells_never_overlap(clips: list[Clip]) -> None:
    for clip in clips:
        for frame in range(FRAMES):
            corners = [actor.corner(frame) for actor in clip.actors]
            places = [corner for corner in corners if corner is not None]
            for x, y in places:
                assert 0 <= x <= SIZE - CELL
                assert 0 <= y <= SIZE - CELL
                assert frame % EVERY or (x % 8, y % 8) == (0, 0)
            if len(places) == 2:
                (a, b), (c, d) = places
                assert max(abs(a - c), abs(b - d)) >= CELL


def test_objects_go_where_the_story_says(clips: list[Clip]) -> None:
    """Directions written out: the box of a moving object goes 24 pixels in 12 steps of 2."""
    steps = {"left": (-2, 0), "right": (2, 0), "up": (0, -2), "down": (0, 2), None: (0, 0)}
    for clip in clips[:60]:
        truth = [clip.shot(frame)[1] for frame in range(FRAMES)]
        for i, role in enumerate(clip.story.roles):
            boxes = [things[i].box for things in truth if things[i] is not None]
            assert boxes
            for a, b in itertools.pairwise(boxes):
                dx, dy = steps[role.motion]
                assert b == (a[0] + dx, a[1] + dy, a[2] + dx, a[3] + dy)
    assert set(steps) == {*DIRECTIONS, None}


def test_objects_appear_in_the_order_of_the_story(clips: list[Clip]) -> None:
    for clip in clips:
        first = [
            next(f for f in range(FRAMES) if actor.corner(f) is not None) for actor in clip.actors
        ]
        assert all(frame == 0 or frame % EVERY == 1 for frame in first)
        if clip.story.event == "beside":
            assert first[1] == 0 < first[0]
        elif clip.story.event == "before":
            assert 0 < first[0] < first[1]
        else:
            assert first == [0] * len(first)


def test_pixels_agree_with_the_truth(clips: list[Clip]) -> None:
    """A pixel outside all boxes is the background's, up to an alpha of 24 / 255 and rounding."""
    for clip in clips[:30]:
        for frame in (0, 3, 6, 12):
            picture, truth = clip.shot(frame)
            outside = np.ones((SIZE, SIZE), dtype=bool)
            for thing in truth:
                if thing is not None:
                    x1, y1, x2, y2 = thing.box
                    outside[y1:y2, x1:x2] = False
            difference = np.abs(picture.astype(float) - clip.background)
            assert difference[outside].max() <= 25
            assert (difference.max() > 25) == any(thing is not None for thing in truth)


def test_key_pictures_are_every_fourth(clips: list[Clip]) -> None:
    clip = clips[0]
    assert clip.pictures().shape == (FRAMES, SIZE, SIZE, 3)
    assert clip.pictures(keys=True).shape[0] == KEYS
    assert (clip.pictures(keys=True) == clip.pictures()[::EVERY]).all()
    with pytest.raises(IndexError, match="frame: expected 0 to 12, got 13"):
        clip.shot(13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mix": {"flying": 1.0}}, "must hold kinds among"),
        ({"mix": {"still": -1.0}}, "weights >= 0"),
        ({"mix": {}}, "positive sum"),
        ({"plain": 2.0}, r"share in \[0, 1\]"),
    ],
)
def test_a_world_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipWorld(**arguments)  # type: ignore[arg-type]


def test_stories_refuse() -> None:
    dog = Role("dog")
    with pytest.raises(ValueError, match="roles: expected one object or two different"):
        Story((dog, replace(dog, colour="red")))
    with pytest.raises(ValueError, match="roles: expected"):
        Story(())
    with pytest.raises(ValueError, match="event: expected None"):
        Story((dog,), "beside")
