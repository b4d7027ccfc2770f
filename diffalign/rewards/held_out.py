"""A reward that is reported and never optimised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core import Reward
from diffalign.rewards.base import BaseReward, load


class HeldOut(BaseReward):
    """Reports a reward and never lets it be optimised, so that it can judge what others improved.

    ``reward``: a name or an object. It has no gradient, and ``align`` takes it as one of
    ``judges`` only. Choose one of another family than what is optimised: rewards that share an
    architecture are no independent judges. Cost: that of the reward.
    """

    def __init__(self, reward: str | Reward) -> None:
        self.reward = load(reward) if isinstance(reward, str) else reward
        self.name = f"held-out({getattr(self.reward, 'name', type(self.reward).__name__)})"
        if isinstance(self.reward, BaseReward):
            self.needs_prompt, self.span = self.reward.needs_prompt, self.reward.span
            self.least = self.reward.least

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        super().check(images[:, 0] if images.ndim == 5 else images, prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            raise ValueError(
                f"{self.name} is held out: no gradient is taken of it. Optimise another reward."
            )
        with torch.no_grad():
            return self.reward(images, prompts)
