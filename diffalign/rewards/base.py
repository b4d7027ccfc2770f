"""What a reward is, and rewards by name.

A reward maps images [B, 3, H, W] in [0, 1] and one prompt per image to [B] numbers, higher is
better. Third parties join by the entry point group ``diffalign.rewards``: each entry loads a
function without required arguments that returns a reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.core import Reward
from diffalign.core.registry import Registry


class BaseReward(ABC):
    """A reward that checks its arguments; subclasses write ``score``."""

    # gradients flow to the images
    differentiable: bool = False
    name: str = "reward"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores, higher is better.

        Raises: ValueError unless images are floating point [B, 3, H, W] and there is one prompt per
        image; TypeError for a single string.
        """
        if isinstance(prompts, str):
            raise TypeError(
                f"{self.name}: prompts must be a sequence with one prompt per image; got one "
                "string. Pass [prompt] * B."
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name}: images must be [B, 3, H, W] in [0, 1]; got shape "
                f"{list(images.shape)}."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"{self.name}: images must be floating point in [0, 1]; got {images.dtype}. "
                "Divide uint8 images by 255."
            )
        if len(prompts) != len(images):
            raise ValueError(
                f"{self.name}: prompts must be one per image; got {len(images)} images and "
                f"{len(prompts)} prompts."
            )
        return self.score(images, prompts)

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores of checked arguments."""


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """A reward by name."""

    name: str
    # what it is, in one line
    description: str
    # gradients flow to the images
    differentiable: bool


REWARDS: Registry[Reward] = Registry(
    "reward",
    "diffalign.rewards",
    targets={
        "emoji-clip": "diffalign.rewards.emoji_clip:EmojiClip",
        "emoji-judge": "diffalign.rewards.emoji_judge:EmojiJudge",
        "emoji-failure": "diffalign.rewards.failure:EmojiFailure",
    },
    advice="diffalign.rewards.available() lists all.",
)
"""Constructors of rewards by name."""

SHIPPED = (
    RewardInfo("emoji-clip", "embedded open_clip similarity for emoji scenes, 64 x 64", True),
    RewardInfo("emoji-judge", "log-probability of GenEval's verdict by the embedded judge", True),
    RewardInfo(
        "emoji-failure", "high where the embedded judges see another image than asked", True
    ),
)


def available() -> tuple[RewardInfo, ...]:
    """Every reward that ``load`` knows, the package's own first; those of other packages are named
    but not imported."""
    others = REWARDS.plugins.items()
    return SHIPPED + tuple(RewardInfo(name, f"from {place}", False) for name, place in others)


def load(name: str, **options: object) -> Reward:
    """The reward ``name``, on the CPU; ``options`` go to its constructor.

    Raises: ValueError for an unknown name (with the nearest ones), for a name that two packages
    claim, and for missing model files.
    """
    return REWARDS.get(name)(**options)
