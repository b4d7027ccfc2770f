"""Rewards: how well an image fits its prompt. ``load(name)`` gives one, ``available()`` lists them.
Importing this loads no model."""

from diffalign.core import Reward
from diffalign.rewards.base import BaseReward, Facts, RewardInfo, available, load
from diffalign.rewards.category_aware import (
    CategoryAware,
    weights_from_correlations,
    weights_from_ratings,
)
from diffalign.rewards.failure import Below, Failure
from diffalign.rewards.held_out import HeldOut
from diffalign.rewards.weighted import Scale, Weighted

__all__ = [
    "BaseReward",
    "Below",
    "CategoryAware",
    "Facts",
    "Failure",
    "HeldOut",
    "Reward",
    "RewardInfo",
    "Scale",
    "Weighted",
    "available",
    "load",
    "weights_from_correlations",
    "weights_from_ratings",
]
