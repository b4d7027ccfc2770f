"""What a reward is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """How well images fit their prompts; higher is better."""

    # whether gradients reach the images
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and a prompt for each -> scores [B]."""
        ...
