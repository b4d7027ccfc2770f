"""Measures of pixels alone, for tests, examples and a first try without any model."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import BaseReward, Facts

FACTS = Facts("Apache-2.0", "none", "0", "0", "examples and tests")


class Brightness(BaseReward):
    """Mean of all pixels, in [0, 1]."""

    differentiable = True
    needs_prompt = False
    name = "brightness"
    facts = FACTS

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Redness(BaseReward):
    """Mean of red minus half of green and blue, in [-1, 1]."""

    differentiable = True
    needs_prompt = False
    name = "redness"
    span = (-1.0, 1.0)
    facts = FACTS

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, green, blue = images.mean((2, 3)).unbind(1)
        return red - 0.5 * (green + blue)


class JpegSize(BaseReward):
    """Size of the image as a JPEG file in kilobytes, smaller is better: a black box.

    ``quality``: of the file, 1 to 95. ``sign``: -1 for small files, 1 for large ones.
    """

    needs_prompt = False
    name = "jpeg-size"
    span = (-100.0, 0.0)
    facts = FACTS

    def __init__(self, quality: int = 95, sign: int = -1) -> None:
        if not 1 <= quality <= 95 or sign not in (-1, 1):
            raise ValueError(
                "jpeg-size needs a quality from 1 to 95 and a sign of -1 or 1; got "
                f"{quality} and {sign}."
            )
        self.quality, self.sign = quality, sign
        if sign == 1:
            self.span = (0.0, 100.0)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from PIL import Image

        sizes = []
        for pixels in bytes_of(images):
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=self.quality)
            sizes.append(self.sign * file.tell() / 1000)
        return torch.tensor(sizes, device=images.device)


def bytes_of(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as [B, H, W, 3] uint8 on the CPU."""
    levels = (images.detach().float().clamp(0, 1) * 255).round()
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
