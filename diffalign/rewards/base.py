"""What a reward is, and rewards by name.

A reward maps images [B, 3, H, W] in [0, 1] and one prompt per image to [B] numbers, higher is
better. Third parties join by the entry point group ``diffalign.rewards``: each entry loads a
function without required arguments that returns a reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from diffalign.core import Reward
from diffalign.core.errors import nearest


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


# name -> (where its constructor lives, what it is, differentiable); modules are imported when first
# asked for
BUILTIN: dict[str, tuple[str, str, bool]] = {
    "emoji-clip": (
        "diffalign.rewards.emoji_clip:EmojiClip",
        "embedded open_clip similarity for emoji scenes, 64 x 64",
        True,
    ),
    "emoji-judge": (
        "diffalign.rewards.emoji_judge:EmojiJudge",
        "log-probability of GenEval's verdict by the embedded judge",
        True,
    ),
}


def available() -> tuple[RewardInfo, ...]:
    """Every reward that ``load`` knows, the package's own first; those of other packages are named
    but not imported."""
    builtin = (RewardInfo(name, text, gradient) for name, (_, text, gradient) in BUILTIN.items())
    plugins = entry_points(group="diffalign.rewards")
    return (*builtin, *(RewardInfo(entry.name, f"from {entry.value}", False) for entry in plugins))


def load(name: str, **options: Any) -> Reward:
    """The reward ``name``, on the CPU; ``options`` go to its constructor.

    Raises: ValueError for an unknown name (with the nearest ones), for a name that two packages
    claim, and for missing model files.
    """
    plugins = {entry.name: entry for entry in entry_points(group="diffalign.rewards")}
    if both := sorted(set(plugins) & set(BUILTIN)):
        raise ValueError(
            f"The plugin {plugins[both[0]].value!r} registers the reward {both[0]!r}, which is "
            "taken; it must choose another name."
        )
    if name in plugins:
        plugin: Callable[..., Reward] = plugins[name].load()
        return plugin(**options)
    if name not in BUILTIN:
        raise ValueError(
            f"Unknown reward {name!r}. Nearest: {nearest(name, [*BUILTIN, *plugins])}."
        )
    module, _, attribute = BUILTIN[name][0].partition(":")
    constructor: Callable[..., Reward] = getattr(import_module(module), attribute)
    return constructor(**options)
