"""Rewards of videos [B, T, 3, H, W]: an image reward over frames, and plain measures of motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from diffalign.core import Reward
from diffalign.rewards.base import BaseReward, Facts, load


class VideoReward(BaseReward):
    """Base of rewards of videos [B, T, 3, H, W] in [0, 1]; an image [B, 3, H, W] is a video of one
    frame."""

    least = 1

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
    """Scores frames of a video with an image reward and keeps their mean, worst, first or last.

    ``reward``: a name or an object. ``frames``: how many, evenly spread and with both ends; None
    for all. Differentiable where the reward is. Cost: that of the reward for each frame.
    """

    differentiable = True
    name = "frames"
    facts = Facts(*["that of the reward"] * 5)

    def __init__(
        self,
        reward: str | Reward = "clip",
        take: Literal["mean", "min", "first", "last"] = "mean",
        frames: int | None = 8,
    ) -> None:
        if take not in ("mean", "min", "first", "last"):
            raise ValueError(f"frames: take must be mean, min, first or last; got {take!r}.")
        if frames is not None and frames < 1:
            raise ValueError(f"frames: frames must be at least 1, or None for all; got {frames}.")
        self.reward = load(reward) if isinstance(reward, str) else reward
        self.take, self.frames = take, frames
        self.differentiable = self.reward.differentiable
        self.name = f"{take}({getattr(self.reward, 'name', type(self.reward).__name__)})"
        if isinstance(self.reward, BaseReward):
            self.needs_prompt, self.span = self.reward.needs_prompt, self.reward.span

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        count = images.shape[1]
        places = {"first": [0], "last": [count - 1]}.get(self.take) or self._places(count)
        frames = images[:, places]
        texts = [prompt for prompt in prompts for _ in places]
        scores = self.reward(frames.flatten(0, 1), texts).view(len(images), len(places))
        return scores.min(1).values if self.take == "min" else scores.mean(1)

    def _places(self, count: int) -> list[int]:
        """Which of ``count`` frames are scored."""
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
