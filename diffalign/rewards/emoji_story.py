"""What a clip of the embedded world shows of its sentence, as a reward of videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.embedded.world.stories import Story, reading
from diffalign.rewards.base import Facts
from diffalign.rewards.video import VideoReward

if TYPE_CHECKING:
    from diffalign.embedded.nets.video_judge import VideoJudge


class EmojiStory(VideoReward):
    """How much of its sentence a clip of the embedded world shows: objects, colours, directions and
    order of events, in [0, 1].

    The mean over the facts of the sentence, read from the boxes that a judge follows from frame to
    frame; the beginning of a clip has a score too. ``judge``: ``emoji-judge`` or
    ``emoji-judge-audit``, so that what was optimised by one is checked by the other. Cost: that of
    the judge for every frame, 13 a clip.
    """

    name = "emoji-story"
    facts = Facts("Apache-2.0", "in the package", "1.0 M", "4 MB", "clips of the embedded world")

    def __init__(self, judge: str = "emoji-judge") -> None:
        choices = ("emoji-judge", "emoji-judge-audit")
        if judge not in choices:
            raise ValueError(f"emoji-story: judge must be {' or '.join(choices)}; got {judge!r}.")
        from diffalign.embedded.load import load
        from diffalign.embedded.nets.video_judge import VideoJudge

        self.judge: VideoJudge = VideoJudge(load(judge))
        if judge != "emoji-judge":
            self.name = f"emoji-story:judge={judge}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        stories = [story_of(prompt) for prompt in prompts]
        return torch.tensor(self.judge.likenesses(images.float(), stories), device=images.device)


def story_of(prompt: str) -> Story:
    """The facts of a sentence, also of the last stage that ``SplitRules`` makes of an event ("a
    photo of a cat beside a clock").

    Raises: ValueError for other sentences.
    """
    if " appears " not in prompt:
        prompt = prompt.replace(" beside ", " and ")
    return reading(prompt)
