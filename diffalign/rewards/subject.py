"""How much images look like reference images: CLIP-I and DINO, for users of IP-Adapter and
DreamBooth."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Foreign, Source, pretrained
from diffalign.rewards.clip_towers import ImageTower
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.preprocessing import fitted, normalised, resized, wide

References = Tensor | Sequence[Foreign]
"""Images [R, 3, H, W] in [0, 1], or a list of file paths and Pillow images of any sizes."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(references: References, owner: str) -> list[Tensor]:
    """References as images [1, 3, H, W]. Raises: ValueError for none, or what is no image."""
    from PIL import Image

    items = list(references)
    if not items:
        raise ValueError(f"{owner}: references must hold at least one image; got none.")
    images = []
    for item in items:
        if isinstance(item, Tensor):
            image = item
        else:
            picture = Image.open(item) if isinstance(item, str | PathLike) else item
            image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"{owner}: references must be images [3, H, W] in [0, 1], paths or Pillow images; "
                f"got {list(image.shape)} of {image.dtype}."
            )
        images.append(image[None])
    return images


class ClipI(NetworkReward):
    """Mean cosine of an image and the references in CLIP ViT-B-32's image embedding.

    ``references``: images [R, 3, H, W], or paths or Pillow images. Also high for the same
    background and pose: ``dino`` looks more at the subject itself.
    Paper: Ruiz et al. 2022, arXiv:2208.12242. 224 pixels, centre crop.
    """

    name = "clip-i"
    needs_prompt = False
    span = (-1.0, 1.0)
    facts = Facts(
        "MIT",
        "openai/clip-vit-base-patch32",
        "88 M",
        "0.2 GB + 0.02",
        "the same subject and style as reference images",
    )

    def __init__(
        self,
        references: References,
        source: Source | None = None,
        revision: str | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        pictures = images_of(references, self.name)
        network = self._network(source or self.facts.source, revision)
        super().__init__(network, **placement)
        with torch.no_grad():
            kind = torch.float64 if self.dtype == torch.float64 else torch.float32
            features = [self.features(picture.to("cpu", kind)) for picture in pictures]
        self.centre = torch.cat(features).mean(0)

    def _network(self, source: Source, revision: str | None) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        whole = pretrained(CLIPVisionModelWithProjection, source, self.name, revision)
        self.side = int(whole.config.image_size)
        return ImageTower(whole.vision_model, whole.visual_projection)

    def features(self, images: Tensor) -> Tensor:
        """Unit features [B, D] of images."""
        pixels = normalised(fitted(images, self.side, "crop"))
        return F.normalize(wide(self.network(pixels.to(self.dtype))), dim=-1)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.features(images) @ self.centre.to(images.device)


class Dino(ClipI):
    """Mean cosine of an image and the references in DINO's class token.

    DINO was trained to tell images apart, so it sees which subject it is rather than what kind.
    ``source``: ``facebook/dino-vits16`` as in DreamBooth, or a DINOv2 by hub id or folder.
    Paper: Ruiz et al. 2022, arXiv:2208.12242. Shorter side 256 of 224 pixels, centre crop.
    """

    name = "dino"
    facts = Facts(
        "Apache-2.0",
        "facebook/dino-vits16",
        "22 M",
        "0.05 GB + 0.03",
        "the same subject as on reference images",
    )

    def _network(self, source: Source, revision: str | None) -> nn.Module:
        from transformers import AutoModel

        model: Foreign = pretrained(AutoModel, source, self.name, revision, unused="pooler.")
        self.side = int(model.config.image_size)
        self.patch = int(model.config.patch_size)
        network: nn.Module = model
        return network

    def features(self, images: Tensor) -> Tensor:
        side = min(self.side, 224) // self.patch * self.patch
        height, width = images.shape[-2:]
        short, long = min(height, width), side * 8 // 7
        images = resized(images, long * height // short, long * width // short)
        y, x = ((size - side) // 2 for size in images.shape[-2:])
        pixels = normalised(images[..., y : y + side, x : x + side], *IMAGENET)
        options = {} if side == self.side else {"interpolate_pos_encoding": True}
        tokens = self.network(pixel_values=pixels.to(self.dtype), **options).last_hidden_state
        return F.normalize(wide(tokens[:, 0]), dim=-1)
