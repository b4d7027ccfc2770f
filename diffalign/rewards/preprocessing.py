"""Images as published networks want them, in plain tensor code that gradients pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Fit = Literal["crop", "pad", "squash"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's constants, which BLIP and most rewards share."""


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] resized as PIL does, bicubic with antialiasing, and clamped to
    [0, 1] again, as 8 bits would; the clamp lets the gradient through."""
    if images.shape[-2:] == (height, width):
        return images
    large = F.interpolate(
        images, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return large + (large.clamp(0.0, 1.0) - large).detach()


def fitted(images: Tensor, side: int, fit: Fit = "crop") -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as [B, 3, side, side].

    "crop": the shorter side becomes ``side``, the centre is cut out. "pad": the longer side becomes
    ``side``, black fills the rest evenly. "squash": both sides become ``side``. On squares all
    three are the same.
    """
    height, width = images.shape[-2:]
    if fit == "squash":
        return resized(images, side, side)
    if fit == "crop":
        short = min(height, width)
        images = resized(images, side * height // short, side * width // short)
        y, x = ((size - side) // 2 for size in images.shape[-2:])
        return images[..., y : y + side, x : x + side]
    long = max(height, width)
    images = resized(images, round(side * height / long), round(side * width / long))
    rows, columns = (side - size for size in images.shape[-2:])
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalised(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """``(images - mean) / std`` by channel."""
    centre, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images - centre) / scale


def wide(values: Tensor) -> Tensor:
    """In float32 at least: what is compared between images is small."""
    return values if values.element_size() >= 4 else values.float()
