"""The judge of clips: it follows the boxes that a picture judge sees from frame to frame, and reads
objects, colours, directions and the order of events.

Nothing is trained here. The picture judge is ``emoji-judge`` or ``emoji-judge-audit``; what was
optimised must be judged by the other one. Frames between key pictures show objects off the grid of
8 pixels, which a picture judge of still scenes does not know; so rules ask for most frames, never
for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from diffalign.embedded.world.stories import DIRECTIONS, Role, Story
from diffalign.embedded.world.vocabulary import NATIVE
from diffalign.tasks.geneval.verdict import Detection, Thresholds

WAY = 0.19
"""Least way of a moving object, in sides of the picture: half of what the world's objects go."""

LATE = 4
"""Frames of the last chunk: an object must be seen in most of them."""


class Detector(Protocol):
    """A judge of pictures."""

    thresholds: Thresholds

    def detect(self, images: Tensor) -> list[list[Detection]]: ...


@dataclass(frozen=True)
class Track:
    """Where one role of a story is seen."""

    # per frame; None where it is not seen
    sightings: tuple[Detection | None, ...]

    @property
    def entrance(self) -> int | None:
        """The first frame that shows it and whose next one does too; None if there is none."""
        places = self.sightings
        for i, sighting in enumerate(places):
            if sighting is not None and (i + 1 == len(places) or places[i + 1] is not None):
                return i
        return None

    def late(self, frames: int = LATE) -> bool:
        """Whether more than half of the last ``frames`` show it."""
        last = self.sightings[-frames:]
        return 2 * sum(sighting is not None for sighting in last) > len(last)

    @property
    def colour(self) -> str | None:
        """The colour of most sightings; the first in the alphabet among equals."""
        colours = sorted(
            sighting.colour for sighting in self.sightings if sighting and sighting.colour
        )
        return max(dict.fromkeys(colours), key=colours.count) if colours else None

    def ways(self, side: tuple[int, int]) -> tuple[float, float]:
        """How far it goes across and down from the first frame to the last, in sides of the
        picture: the line of least squares through the centres. Zeros without two sightings."""
        points = [
            (i, (x1 + x2) / 2 / side[0], (y1 + y2) / 2 / side[1])
            for i, sighting in enumerate(self.sightings)
            if sighting is not None
            for x1, y1, x2, y2 in [sighting.box]
        ]
        if len(points) < 2:
            return 0.0, 0.0
        times, across, down = np.array(points).T
        span = len(self.sightings) - 1
        x, y = (float(np.polyfit(times, centre, 1)[0]) * span for centre in (across, down))
        return x, y

    def direction(self, side: tuple[int, int]) -> str | None:
        """The direction of its motion in pictures of ``side`` (width, height), or None where it
        stands still, goes askew, or is seen in less than half of the frames.

        Read from ``ways``.
        """
        count = sum(sighting is not None for sighting in self.sightings)
        if count < max(2, len(self.sightings) / 2):
            return None
        ways = self.ways(side)
        axis = int(abs(ways[1]) > abs(ways[0]))
        if abs(ways[axis]) < WAY or abs(ways[axis]) < 2 * abs(ways[1 - axis]):
            return None
        return next(word for word, signs in DIRECTIONS.items() if signs[axis] * ways[axis] > 0)


@dataclass(frozen=True)
class ClipVerdict:
    """Which facts of a story a clip shows. Facts that the story does not state are None."""

    # per role: the object is there at the end
    objects: tuple[bool, ...]
    # per role
    colours: tuple[bool | None, ...]
    motions: tuple[bool | None, ...]
    order: bool | None

    @property
    def facts(self) -> tuple[bool, ...]:
        """All facts that the story states."""
        every = (*self.objects, *self.colours, *self.motions, self.order)
        return tuple(fact for fact in every if fact is not None)

    @property
    def right(self) -> bool:
        """Whether all facts are right."""
        return all(self.facts)

    @property
    def share(self) -> float:
        """Share of the facts that are right."""
        return sum(self.facts) / len(self.facts)


def judged(
    story: Story, tracks: Sequence[Track], side: tuple[int, int], late: int = LATE
) -> ClipVerdict:
    """The verdict on a story from the tracks of its roles, in the order of the roles, in pictures
    of ``side``."""

    def moves(role: Role, track: Track) -> bool | None:
        return None if role.motion is None else track.direction(side) == role.motion

    pairs = list(zip(story.roles, tracks, strict=True))
    return ClipVerdict(
        tuple(track.late(late) for track in tracks),
        tuple(None if r.colour == NATIVE else track.colour == r.colour for r, track in pairs),
        tuple(moves(role, track) for role, track in pairs),
        None if story.event is None else _ordered(story.event, *tracks),
    )


def _ordered(event: str, first: Track, second: Track) -> bool:
    """Whether the first object appears: beside the second, which is there from the start, or before
    the second appears."""
    if first.entrance is None or second.entrance is None:
        return False
    if event == "beside":
        return second.entrance == 0 < first.entrance
    return 0 < first.entrance < second.entrance


def likeness(
    story: Story, tracks: Sequence[Track], side: tuple[int, int], late: int = LATE
) -> float:
    """How much of a story a clip shows, in [0, 1]: the mean over its facts. The beginning of a clip
    has a likeness too, so it can guide a search.

    An object counts as its scores in the last frames, a colour as the share of its sightings, a
    motion as its way against that of the world's objects in as many frames. An event counts as 0
    where it went wrong, as 1 where it happened, and in between as long as it still can.
    """
    facts: list[float] = []
    for role, track in zip(story.roles, tracks, strict=True):
        last = track.sightings[-late:]
        facts.append(sum(sighting.score for sighting in last if sighting) / len(last))
        sightings = [sighting for sighting in track.sightings if sighting]
        if role.colour != NATIVE:
            right = sum(sighting.colour == role.colour for sighting in sightings)
            facts.append(right / max(1, len(sightings)))
        if role.motion is not None:
            way = 2 * WAY * (len(track.sightings) - 1) / 12 * (LATE / late)
            signs = DIRECTIONS[role.motion]
            along = sum(sign * part for sign, part in zip(signs, track.ways(side), strict=True))
            facts.append(min(1.0, max(0.0, along / way)) if way else 0.0)
    if story.event is not None:
        facts.append(_happened(story.event, *(track.entrance for track in tracks)))
    return sum(facts) / len(facts)


def _happened(event: str, first: int | None, second: int | None) -> float:
    """How far an event has come, from the frames at which its objects appear."""
    if first == 0 or (event == "beside" and second != 0):
        return 0.0
    if event == "beside":
        return 0.5 if first is None else 1.0
    if first is None:
        return 0.0 if second is not None else 1 / 3
    if second is None:
        return 2 / 3
    return float(first < second)


class VideoJudge:
    """Verdicts on clips whose last chunk has ``late`` frames: 1 for a film of key pictures.

    Cost: that of the picture judge for every frame.
    """

    def __init__(self, judge: Detector, late: int = LATE) -> None:
        self.judge, self.late = judge, late

    def tracks(self, videos: Tensor, stories: Sequence[Story]) -> list[tuple[Track, ...]]:
        """Tracks of the roles of each story in its video; videos are [B, T, 3, H, W] in [0, 1].

        Raises: ValueError for another shape, or another number of stories.
        """
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise ValueError(
                f"videos: expected [B, T, 3, H, W] in [0, 1], got shape {list(videos.shape)}"
            )
        if len(videos) != len(stories):
            raise ValueError(f"stories: expected one per video, {len(videos)}, got {len(stories)}")
        result = []
        for video, story in zip(videos, stories, strict=True):
            answers = self.judge.detect(video)
            result.append(tuple(self._track(answers, role) for role in story.roles))
        return result

    def verdicts(self, videos: Tensor, stories: Sequence[Story]) -> list[ClipVerdict]:
        """What each video [T, 3, H, W] of [B, T, 3, H, W] in [0, 1] shows of its story."""
        side = (videos.shape[-1], videos.shape[-2])
        tracks = self.tracks(videos, stories)
        return [
            judged(story, line, side, self.late)
            for story, line in zip(stories, tracks, strict=True)
        ]

    def likenesses(self, videos: Tensor, stories: Sequence[Story]) -> list[float]:
        """How much of its story each video of [B, T, 3, H, W] in [0, 1] shows, in [0, 1]."""
        side = (videos.shape[-1], videos.shape[-2])
        tracks = self.tracks(videos, stories)
        return [
            likeness(story, line, side, self.late)
            for story, line in zip(stories, tracks, strict=True)
        ]

    def _track(self, answers: Sequence[Sequence[Detection]], role: Role) -> Track:
        """The best detection of the role's object in each frame."""
        floor = self.judge.thresholds.threshold
        return Track(
            tuple(
                max(
                    (
                        detection
                        for detection in frame
                        if detection.name == role.name and detection.score > floor
                    ),
                    key=lambda detection: detection.score,
                    default=None,
                )
                for frame in answers
            )
        )
