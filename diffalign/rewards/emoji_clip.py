"""``emoji-clip`` and ``emoji-clip-2`` as rewards: cosine of image and prompt in an embedded dual
encoder (the CLIP score of Hessel et al. 2021, arXiv:2104.08718, without its factor and its cut at
zero)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from diffalign.rewards.base import BaseReward, Facts
from diffalign.seams.words import TextTower, open_clip_tower

if TYPE_CHECKING:
    from diffalign.embedded.nets.clip import Clip


class EmojiClip(BaseReward):
    """Cosine in [-1, 1] between image and prompt, for 64 x 64 scenes of the embedded world.

    Differentiable. Other sizes are resized with antialiasing. ``model`` is a loaded ``emoji-clip``,
    None loads the embedded one. Meaningful for objects, colours, numbers and relations that the
    world knows; any text is accepted. Cost: about 4 ms an image on one core, three times that with
    gradient.
    """

    differentiable = True
    name = "emoji-clip"
    span = (-1.0, 1.0)
    facts = Facts("Apache-2.0", "in the package", "3.1 M", "12 MB", "scenes of the embedded world")

    def __init__(self, model: Clip | None = None) -> None:
        if model is None:
            from diffalign.embedded.load import load

            model = load(self.name)
        self.model = model

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.model.similarity(images, prompts)

    @cached_property
    def words(self) -> TextTower:
        """The vocabulary of the text tower."""
        return open_clip_tower(self.model.model, self.model.tokenizer)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> features [B, 192] of length 1."""
        return self.model.image(images)


class EmojiClip2(EmojiClip):
    """Cosine in [-1, 1] between image and prompt, for 128 x 128 scenes of the embedded world's
    second edition, which ``emoji-dit`` makes.

    Differentiable. As ``EmojiClip`` but for the size; ``model`` is a loaded ``emoji-clip-2``, None
    loads the embedded one. Cost: about that of ``EmojiClip``.
    """

    name = "emoji-clip-2"
