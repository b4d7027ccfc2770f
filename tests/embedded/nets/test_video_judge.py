"""The rules of the clip judge on tracks written by hand, and its accuracy on rendered clips."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.embedded.load import load
from diffalign.embedded.nets.video_judge import Track, VideoJudge, judged, likeness
from diffalign.embedded.world.clips import ClipWorld
from diffalign.embedded.world.stories import Role, Story, reading
from diffalign.tasks.geneval.verdict import Detection, Thresholds


def seen(name: str, x: float, y: float, colour: str = "red", score: float = 0.9) -> Detection:
    return Detection(name, score, (x - 5, y - 5, x + 5, y + 5), colour)


def track(*centres: tuple[float, float] | None) -> Track:
    return Track(tuple(None if c is None else seen("dog", *c) for c in centres))


@pytest.mark.parametrize(
    ("centres", "direction"),
    [
        ([(50 - 2 * i, 20) for i in range(13)], "left"),
        ([(10 + 2 * i, 20 + i / 3) for i in range(13)], "right"),
        ([(30, 50 - 2 * i) for i in range(13)], "up"),
        ([(30, 10 + 2 * i) for i in range(13)], "down"),
        ([(30, 30)] * 13, None),
        # askew
        ([(10 + 2 * i, 10 + 2 * i) for i in range(13)], None),
        # too slow: 10 of 64 pixels
        ([(10 + 10 / 12 * i, 10) for i in range(13)], None),
        # seen in 6 of 13 frames, then in 7
        ([(10 + 2 * i, 10) if i < 6 else None for i in range(13)], None),
        ([(10 + 2 * i, 10) if i % 2 == 0 else None for i in range(13)], "right"),
        ([None] * 13, None),
    ],
)
def test_directions(centres: list[tuple[float, float] | None], direction: str | None) -> None:
    assert track(*centres).direction((64, 64)) == direction


@pytest.mark.parametrize(
    ("pattern", "entrance", "late"),
    [
        ("1111111111111", 0, True),
        ("0000011111111", 5, True),
        # a single sighting is no entrance
        ("0100011111111", 5, True),
        ("0000000000111", 10, True),
        ("0000000000011", 11, False),
        ("0000000000001", 12, False),
        ("1111111110000", 0, False),
        ("0000000000000", None, False),
    ],
)
def test_entrances(pattern: str, entrance: int | None, late: bool) -> None:
    line = track(*((30, 30) if sign == "1" else None for sign in pattern))
    assert line.entrance == entrance
    assert line.late() == late


def test_a_film_of_key_pictures_has_one_late_frame() -> None:
    """Four key pictures; the object appears in the last one."""
    line = track(None, None, None, (30, 30))
    assert not line.late()
    assert line.late(1)
    assert line.entrance == 3


def test_colour_is_that_of_most_sightings() -> None:
    line = Track((seen("dog", 9, 9, "red"), seen("dog", 9, 9), seen("dog", 9, 9, "blue"), None))
    assert line.colour == "red"
    assert Track((None,)).colour is None


@pytest.mark.parametrize(
    ("event", "first", "second", "right"),
    [
        ("beside", 5, 0, True),
        ("beside", 0, 5, False),
        ("beside", 0, 0, False),
        ("beside", 5, 1, False),
        ("beside", None, 0, False),
        ("before", 1, 5, True),
        ("before", 5, 1, False),
        ("before", 5, 5, False),
        # what is there from the start does not appear
        ("before", 0, 5, False),
        ("before", 1, None, False),
    ],
)
def test_order(event: str, first: int | None, second: int | None, right: bool) -> None:
    def line(start: int | None) -> Track:
        return track(*((9, 9) if start is not None and i >= start else None for i in range(13)))

    story = Story((Role("dog"), Role("cat")), event)
    assert judged(story, [line(first), line(second)], (64, 64)).order is right


@pytest.mark.parametrize(
    ("event", "first", "second", "value"),
    [
        ("beside", None, 0, 0.5),
        ("beside", 5, 0, 1.0),
        ("beside", 0, 0, 0.0),
        ("beside", 5, None, 0.0),
        ("before", None, None, 1 / 3),
        ("before", 1, None, 2 / 3),
        ("before", 1, 5, 1.0),
        ("before", 5, 5, 0.0),
        ("before", None, 5, 0.0),
        ("before", 0, None, 0.0),
    ],
)
def test_an_event_on_its_way(
    event: str, first: int | None, second: int | None, value: float
) -> None:
    """Objects that are seen count .9, others nothing; the event is the third of three facts."""

    def line(start: int | None) -> Track:
        return track(*((9, 9) if start is not None and i >= start else None for i in range(9)))

    story = Story((Role("dog"), Role("cat")), event)
    objects = 0.9 * sum(start is not None for start in (first, second))
    expected = (objects + value) / 3
    assert likeness(story, [line(first), line(second)], (64, 64)) == pytest.approx(expected)


def test_likeness_of_a_motion_in_a_colour() -> None:
    """Eight pixels in four steps: WAY is 12.16 pixels in twelve, half of what counts as all."""
    story = reading("a photo of a red dog moving left")
    line = track(*((40 - 2 * i, 20) for i in range(5)))
    assert likeness(story, [line], (64, 64)) == pytest.approx((0.9 + 1 + 8 / (24.32 / 3)) / 3)
    back = track(*((30 + 2 * i, 20) for i in range(5)))
    assert likeness(story, [back], (64, 64)) == pytest.approx((0.9 + 1 + 0) / 3)
    assert likeness(story, [track((30, 20))], (64, 64)) == pytest.approx((0.9 + 1 + 0) / 3)
    assert likeness(story, [track(None, None)], (64, 64)) == 0


class Script:
    """A picture judge that answers what it is told."""

    thresholds = Thresholds(threshold=0.4)

    def __init__(self, answers: Sequence[list[Detection]]) -> None:
        self.answers = list(answers)

    def detect(self, images: Tensor) -> list[list[Detection]]:
        assert len(images) == len(self.answers)
        return self.answers


def test_a_verdict_has_the_stated_facts_alone() -> None:
    story = reading("a photo of a dog moving left and a red apple")
    answers = [
        [seen("dog", 50 - 2 * i, 20), seen("apple", 30, 50, "blue"), seen("cat", 9, 9)]
        for i in range(13)
    ]
    (verdict,) = VideoJudge(Script(answers)).verdicts(torch.rand(1, 13, 3, 64, 64), [story])
    assert verdict.objects == (True, True)
    assert verdict.colours == (None, False)
    assert verdict.motions == (True, None)
    assert verdict.order is None
    assert not verdict.right
    assert verdict.share == 3 / 4
    weak = [[seen("dog", 30, 30, score=0.4)]] * 13
    (verdict,) = VideoJudge(Script(weak)).verdicts(torch.rand(1, 13, 3, 64, 64), [story])
    assert verdict.objects == (False, False)


def test_the_best_detection_of_a_frame_counts() -> None:
    frame = [seen("dog", 10, 10, score=0.6), seen("dog", 40, 40, score=0.8)]
    ((line,),) = VideoJudge(Script([frame])).tracks(
        torch.rand(1, 1, 3, 64, 64), [Story((Role("dog"),))]
    )
    assert line.sightings[0] == frame[1]


@pytest.mark.parametrize("shape", [(13, 3, 64, 64), (1, 3, 13, 64, 64)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"videos: expected \[B, T, 3, H, W\]"):
        VideoJudge(Script([])).verdicts(torch.rand(shape), [Story((Role("dog"),))])


def test_one_story_per_video() -> None:
    with pytest.raises(ValueError, match="stories: expected one per video, 2, got 1"):
        VideoJudge(Script([])).verdicts(torch.rand(2, 1, 3, 64, 64), [Story((Role("dog"),))])


@pytest.mark.slow
def test_rendered_clips_are_read_right_and_false_stories_are_not() -> None:
    """Of 40 clips; the figures for more stand in docs/embedded.md."""
    judge = VideoJudge(load("emoji-judge"))
    right, wrong = [], []
    for clip, false in ClipWorld().wrong(1_000_000, 40):
        video = torch.from_numpy(clip.pictures()).permute(0, 3, 1, 2)[None].float() / 255
        right.append(judge.verdicts(video, [clip.story])[0].right)
        wrong.append(judge.verdicts(video, [false])[0].right)
    assert np.mean(right) >= 0.9
    assert np.mean(wrong) <= 0.05
