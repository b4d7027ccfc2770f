"""Rewards of videos [B, T, 3, H, W]: an image reward over frames, and plain measures of motion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from diffalign.core import Reward, Stage
from diffalign.rewards.base import BaseReward, Facts, load
from diffalign.rewards.held_out import HeldOut
from diffalign.rewards.weighted import Weighted

Take = Literal["mean", "min", "first", "middle", "last", "stages"]
Features = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] -> features [B, D]."""


class VideoReward(BaseReward):
    """Base of rewards of videos [B, T, 3, H, W] in [0, 1]; an image [B, 3, H, W] is a video of one
    frame."""

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        if images.ndim == 4:
            images = images[:, None]
        if images.ndim != 5:
            raise ValueError(
                f"{self.name}: videos must be [B, T, 3, H, W] in [0, 1]; got shape "
                f"{list(images.shape)}."
            )
        if images.shape[1] < self.least:
            raise ValueError(
                f"{self.name}: a video needs at least {self.least} frames; got {images.shape[1]}."
            )
        super().check(images[:, 0], prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.check(images, prompts)
        return self.score(images[:, None] if images.ndim == 4 else images, prompts)


class OverFrames(VideoReward):
    """Scores frames of a video with an image reward and keeps their mean, worst, or one of them.

    ``reward``: a name or an object. ``frames``: how many, evenly spread and with both ends; None
    for all. ``take="stages"``: the first, the middle and the last frame; a search that scores a
    video before it is whole takes the one of its stage. Differentiable where the reward is.
    Cost: that of the reward for each frame.
    """

    differentiable = True
    name = "frames"
    facts = Facts(*["that of the reward"] * 5)

    def __init__(
        self, reward: str | Reward = "clip", take: Take = "mean", frames: int | None = 8
    ) -> None:
        if take not in get_args(Take):
            choices = ", ".join(get_args(Take))
            raise ValueError(f"frames: take must be one of {choices}; got {take!r}.")
        if frames is not None and frames < 1:
            raise ValueError(f"frames: frames must be at least 1, or None for all; got {frames}.")
        self.reward = load(reward) if isinstance(reward, str) else reward
        self.take, self.frames = take, frames
        self.differentiable = self.reward.differentiable
        self.name = f"{take}({getattr(self.reward, 'name', type(self.reward).__name__)})"
        if isinstance(self.reward, BaseReward):
            self.needs_prompt, self.span = self.reward.needs_prompt, self.reward.span

    def at(self, stage: Stage) -> BaseReward:
        return OverFrames(self.reward, stage, None) if self.take == "stages" else self

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        places = self._places(images.shape[1])
        frames = images[:, places]
        texts = [prompt for prompt in prompts for _ in places]
        scores = self.reward(frames.flatten(0, 1), texts).view(len(images), len(places))
        return scores.min(1).values if self.take == "min" else scores.mean(1)

    def _places(self, count: int) -> list[int]:
        """Which of ``count`` frames are scored."""
        stages = {"first": [0], "middle": [count // 2], "last": [count - 1]}
        if self.take in stages:
            return stages[self.take]
        if self.take == "stages":
            return [place for places in stages.values() for place in places]
        if self.frames is None or self.frames >= count:
            return list(range(count))
        if self.frames == 1:
            return [count // 2]
        return [round(i * (count - 1) / (self.frames - 1)) for i in range(self.frames)]


class MotionSmoothness(VideoReward):
    """How well each frame is the mean of its neighbours: 1 minus the mean absolute difference.

    A still video scores 1 as a perfectly even fade does, so pair it with a reward of content.
    In the manner of VBench's measure (Huang et al. 2023, arXiv:2311.17982), without its network
    for the frames between. Needs 3 frames.
    """

    differentiable = True
    needs_prompt = False
    name = "motion-smoothness"
    least = 3
    facts = Facts("Apache-2.0", "none", "0", "0", "jerks between frames")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        between = (images[:, :-2] + images[:, 2:]) / 2
        return 1 - (images[:, 1:-1] - between).abs().mean((1, 2, 3, 4))


class Flicker(VideoReward):
    """Steadiness from frame to frame: 1 minus the mean absolute difference of neighbours.

    The measure of VBench (Huang et al. 2023, arXiv:2311.17982, temporal flickering), on [0, 1].
    A still video scores 1. Needs 2 frames.
    """

    differentiable = True
    needs_prompt = False
    name = "flicker"
    least = 2
    facts = Facts("Apache-2.0", "none", "0", "0", "flicker between frames")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1 - (images[:, 1:] - images[:, :-1]).abs().mean((1, 2, 3, 4))


class SubjectConsistency(VideoReward):
    """Whether what a video shows stays itself: how alike the features of its frames are.

    It is the mean of two cosines, with the first frame and with the frame before, over the frames
    after the first. ``features``: ``dino`` or ``clip-i``, whose network is loaded from ``source``;
    ``emoji-clip``, which ships; or a function of images [B, 3, H, W] that gives [B, D]. A still
    video scores 1. The measure of VBench (Huang et al. 2023, arXiv:2311.17982), where it is DINO's.
    Needs 2 frames.
    Cost: the features of each frame.
    """

    differentiable = True
    needs_prompt = False
    name = "subject-consistency"
    least = 2
    span = (-1.0, 1.0)
    facts = Facts(
        licence="that of the features",
        source="that of the features",
        size="that of the features",
        memory="that of the features",
        best="a subject that changes between frames",
    )

    def __init__(self, features: str | Features = "dino", source: str | None = None) -> None:
        self.features = _features_of(features, source) if isinstance(features, str) else features

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = self.features(images.flatten(0, 1)).float().view(*images.shape[:2], -1)
        rows = functional.normalize(rows, dim=-1)
        first = (rows[:, 1:] * rows[:, :1]).sum(-1)
        before = (rows[:, 1:] * rows[:, :-1]).sum(-1)
        return ((first + before) / 2).mean(1)


def _features_of(name: str, source: str | None) -> Features:
    """A network's features by the name of a reward that has them."""
    if name == "emoji-clip":
        from diffalign.rewards.emoji_clip import EmojiClip

        return EmojiClip().image_features
    if name not in ("dino", "clip-i"):
        raise ValueError(
            "subject-consistency: features must be dino, clip-i, emoji-clip, or a function of "
            f"images; got {name!r}."
        )
    from diffalign.rewards.subject import ClipI, Dino

    grey = torch.full((1, 3, 64, 64), 0.5)
    tower = (Dino if name == "dino" else ClipI)(grey, source)

    def features(images: Tensor) -> Tensor:
        tower.network.to(images.device)
        return tower.features(images)

    return features


def for_videos(reward: Reward) -> Reward:
    """A reward of videos: what scores images only scores frames, ``frames`` with its defaults.

    A function that is no ``BaseReward`` is taken to know videos.
    """
    if isinstance(reward, Weighted):
        return reward.of_videos(for_videos)
    if isinstance(reward, HeldOut):
        return HeldOut(for_videos(reward.reward))
    if isinstance(reward, BaseReward) and not isinstance(reward, VideoReward):
        return OverFrames(reward)
    return reward
