"""Rewards: how well an image fits its prompt. ``load(name)`` gives one, ``available()`` lists them.
Importing this loads no model."""

from diffalign.core import Reward
from diffalign.rewards.base import BaseReward, RewardInfo, available, load
from diffalign.rewards.failure import Below, Failure
from diffalign.rewards.weighted import Scale, Weighted

__all__ = [
    "BaseReward",
    "Below",
    "Failure",
    "Reward",
    "RewardInfo",
    "Scale",
    "Weighted",
    "available",
    "load",
]
