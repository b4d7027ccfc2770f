"""What a reward is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.core.words import Words


@runtime_checkable
class Reward(Protocol):
    """How well images fit their prompts; higher is better."""

    # whether gradients reach the images
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and a prompt for each -> scores [B]."""
        ...


@runtime_checkable
class Dual(Protocol):
    """A reward with two towers: images and texts in one space, compared by their cosine."""

    @property
    def words(self) -> Words:
        """The vocabulary of its text tower."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> features [B, F]."""
        ...


@runtime_checkable
class Failures(Protocol):
    """A reward that is high where the generator fails, and says when that is a failure."""

    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether every member of the ensemble sees a failure in each image, bool [B]."""
        ...

    def confirms(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether the judge that is no member of the ensemble sees it too, bool [B]."""
        ...
