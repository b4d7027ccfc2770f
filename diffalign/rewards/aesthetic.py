"""LAION's aesthetic predictors: what people find beautiful, whatever the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import DAMAGED, Source, file_of, fill, pretrained, tensors_of
from diffalign.rewards.clip_towers import ImageTower
from diffalign.rewards.head import Head
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.preprocessing import fitted, normalised, wide


class Aesthetic(NetworkReward):
    """Beauty on a scale of 1 to 10, second version: ViT-L-14's embedding and five linear layers.

    ``head``: the file of the layers; by default the authors' ``sac+logos+ava1-l14-linearMSE.pth``,
    fetched from their repository. ``ava+logos-l14-linearMSE.pth`` gives other numbers. ``source``:
    CLIP ViT-L-14 by hub id or folder. It is linear in a normalised embedding, so the easiest of all
    to fool: pair it with a reward that reads the prompt.
    Source: LAION, "improved aesthetic predictor", 2022.
    """

    name = "aesthetic"
    needs_prompt = False
    span = (1.0, 10.0)
    page = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    file = "sac+logos+ava1-l14-linearMSE.pth"
    facts = Facts(
        "Apache-2.0",
        "openai/clip-vit-large-patch14 and a file of its authors' repository",
        "304 M",
        "0.6 GB + 0.2",
        "looks only (.77 of pairs on HPDv2); below .20 in every category of composition",
    )

    def __init__(
        self,
        source: Source = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        head: Source | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        from transformers import CLIPVisionModelWithProjection

        whole = pretrained(CLIPVisionModelWithProjection, source, self.name, revision)
        tower = ImageTower(whole.vision_model, whole.visual_projection)
        self.side = int(whole.config.image_size)
        tensors = self._head_tensors(head)
        layers = self._layers(tensors)
        fill(layers, tensors, self.name, "this predictor's layers")
        super().__init__(nn.ModuleDict({"tower": tower, "head": layers}), **placement)
        # compared values stay in fp32
        if self.dtype != torch.float64:
            layers.float()

    def _head_tensors(self, head: Source | None) -> dict[str, Tensor]:
        if head is not None:
            return tensors_of(file_of(head, (self.file,), self.name, None), self.name)
        try:
            tensors: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
                self.page + self.file.replace("+", "%2B"), map_location="cpu", weights_only=True
            )
        except DAMAGED as error:
            raise ValueError(
                f"{self.name}: {self.file} could not be fetched: {error}. Pass head= a local copy."
            ) from error
        return dict(tensors)

    def _layers(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        try:
            return Head.like(tensors)
        except KeyError as error:
            raise ValueError(
                f"{self.name}: the file of the head has no {error}; it is not that of the second "
                "predictor. The first one is 'aesthetic-v1'."
            ) from error

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalised(fitted(images, self.side, "crop")).to(self.dtype)
        features = F.normalize(wide(self.network["tower"](pixels)), dim=-1)
        scores: Tensor = self.network["head"](features)
        return scores.flatten()


class AestheticV1(Aesthetic):
    """Beauty on a scale of 1 to 10, first version: a linear map of ViT-L-14's embedding.

    ``head``: the authors' ``sa_0_4_vit_l_14_linear.pth``, fetched from their repository by default.
    Source: LAION, "aesthetic predictor", 2022.
    """

    name = "aesthetic-v1"
    page = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/"
    file = "sa_0_4_vit_l_14_linear.pth"
    facts = Facts(
        "MIT",
        "openai/clip-vit-large-patch14 and a file of its authors' repository",
        "304 M",
        "0.6 GB + 0.2",
        "looks only; below .20 in every category of composition",
    )

    def _layers(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        if tensors.keys() != {"weight", "bias"}:
            raise ValueError(
                f"{self.name}: expected a file with 'weight' and 'bias'; got "
                f"{', '.join(sorted(tensors)[:4])}. The second predictor is 'aesthetic'."
            )
        return nn.Linear(tensors["weight"].shape[1], 1)
