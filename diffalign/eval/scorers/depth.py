"""DPT (Ranftl et al. 2021, arXiv:2103.13413) as T2I-CompBench reads it: larger is nearer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.core.types import Json, Pipeline
from diffalign.eval.scorers.pretrained import facts_of, normalised, pretrained, resized
from diffalign.tasks.compbench.rules import FRAME

if TYPE_CHECKING:
    from torch import Tensor

NAME = "Intel/dpt-hybrid-midas"
HALF = (0.5, 0.5, 0.5)


class Depth:
    """Inverse depth of an image."""

    def __init__(self, name: str = NAME, device: str = "cpu") -> None:
        from transformers import DPTForDepthEstimation

        self.name, self.device = name, device
        self.model: Pipeline = pretrained(DPTForDepthEstimation, name, device)
        self.side = int(self.model.config.image_size)

    def facts(self) -> Json:
        """Name and hash of the network, and the side at which it sees images."""
        return facts_of(self.name, self.model) | {"side": self.side}

    def map(self, image: Tensor) -> list[list[float]]:
        """Rows of the depth map of an image [3, H, W], in steps of 1 / 255, of the size in which
        the rules read boxes: short side 479."""
        import torch
        from torch.nn.functional import interpolate

        pixels = resized(image.to(self.device), (self.side, self.side), "bicubic")
        with torch.no_grad():
            depth = self.model(pixel_values=normalised(pixels, HALF, HALF)[None]).predicted_depth
        low, high = depth.min(), depth.max()
        depth = (depth - low) / (high - low).clamp(min=1e-12)
        height, width = image.shape[-2:]
        full = interpolate(depth[None], (height, width), mode="bilinear", align_corners=True)
        full = (full * 255).floor() / 255
        scale = FRAME / min(height, width)
        frame = (round(height * scale), round(width * scale))
        rows: list[list[float]] = interpolate(full, frame, mode="bilinear", align_corners=False)[
            0, 0
        ].tolist()
        return rows
