"""The negative text's arguments, a row for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffalign.seams.denoiser.tap import Generation


class TextRows:
    """The negative text's arguments, a row for each image that asks."""

    def __init__(self, text: Mapping[str, Any], generation: Generation) -> None:
        # by the denoiser's names: tensors [texts, ...], or lists with one per text
        self.text, self.generation = text, generation
        # (name, images, device, dtype) -> rows; kept, since steps repeat them
        self._rows: dict[Any, Tensor] = {}

    def __call__(
        self, name: str, images: Sequence[int], reference: Tensor, axis: int = 0
    ) -> Tensor:
        """Rows of the argument ``name``, on the device and in the dtype of ``reference``."""
        key = (name, tuple(images), reference.device, reference.dtype)
        if key not in self._rows:
            index = torch.tensor(self.numbers(name, images, axis))
            text = self.text[name].to(reference.device, reference.dtype)
            self._rows[key] = text.index_select(axis, index.to(reference.device))
        return self._rows[key]

    def mask(self, name: str, images: Sequence[int], reference: Tensor, text: Tensor) -> Tensor:
        """Rows of the mask ``name`` of the tokens ``text`` [rows, L, ...]."""
        if name in self.text:
            return self(name, images, reference)
        return reference.new_ones(text.shape[:2])

    def numbers(self, name: str, images: Sequence[int], axis: int = 0) -> list[int]:
        """Which negative text each image takes; a prompt's images stand together."""
        text, batch = self.text[name], self.generation.batch
        texts = len(text) if isinstance(text, list) else text.shape[axis]
        values = self.generation.plan.values
        names = ("num_images_per_prompt", "num_videos_per_prompt")
        copies = next((int(values[n]) for n in names if values.get(n)), 1)
        if texts not in (1, batch // copies, batch):
            many = f" with {copies} images each" if copies > 1 else ""
            raise ValueError(
                f"NAG got {texts} negative texts for {batch // copies} prompts{many}; give one, "
                "or one per prompt."
            )
        return [image * texts // batch for image in images]
