"""ImageReward."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from diffalign.rewards.base import Facts
from diffalign.rewards.blip import Texts, read
from diffalign.rewards.checkpoint import (
    Foreign,
    Source,
    file_of,
    fill,
    silent_start,
    tensors_of,
    tokenizer_of,
)
from diffalign.rewards.head import Head
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.preprocessing import fitted, normalised, wide

CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation that the authors take off the raw score."""
RULES = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.attn.projection."),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"^text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
"""From the names of the published file to those of transformers, applied in this order."""
UNUSED = re.compile(r"^(vision_proj|text_proj)\.|\.position_ids$")
"""Weights of the file that the score does not use."""


class ImageReward(NetworkReward):
    """Human preference by BLIP: the prompt is read beside the image, and one number comes out.

    Standardised on its training set: most images score between -2.3 and 2. ``source``: a hub id,
    folder or file with ``ImageReward.pt``; ``tokenizer``: BERT's, by hub id or folder.
    Paper: Xu et al. 2023, arXiv:2304.05977. Reads 35 tokens, 224 pixels, centre crop.
    """

    name = "image-reward"
    span = (-3.0, 3.0)
    facts = Facts(
        "Apache-2.0",
        "THUDM/ImageReward",
        "447 M",
        "0.9 GB + 0.2",
        "shape .52, texture .73, colour .58: the best with gradient for shape and texture",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        tokenizer: Source = "google-bert/bert-base-uncased",
        **placement: Unpack[Placement],
    ) -> None:
        path = file_of(source, ("ImageReward.pt",), self.name, revision)
        network = _network(tensors_of(path, self.name), self.name)
        super().__init__(network, **placement)
        self.side = int(self.network["vision"].config.image_size)
        if self.dtype != torch.float64:
            self.network["head"].float()
        self.texts = Texts(tokenizer_of(tokenizer, self.name), self.name)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalised(fitted(images, self.side, "crop")).to(self.dtype)
        tokens = self.network["vision"](pixel_values=pixels).last_hidden_state
        ids, mask = self.texts(prompts, images.device)
        first = read(self.network["text"], ids, mask, tokens)[:, 0]
        raw: Tensor = self.network["head"](wide(first))
        return (raw - CENTRE) / SPREAD


def _network(tensors: Mapping[str, Tensor], owner: str) -> nn.ModuleDict:
    """Vision, text and head with the weights of the published file."""
    from transformers import BlipTextModel, BlipVisionModel

    renamed = {}
    for name, tensor in tensors.items():
        key = name
        for rule, text in RULES:
            key = re.sub(rule, text, key)
        if not UNUSED.search(key):
            renamed[key] = tensor
    try:
        vision_config, text_config = _configs(renamed)
        head = Head.like(renamed, "head.")
    except KeyError as error:
        raise ValueError(f"{owner}: the file is not ImageReward's: {error} is missing.") from error
    with silent_start():
        network = nn.ModuleDict(
            {
                "vision": BlipVisionModel(vision_config),
                "text": BlipTextModel(text_config, add_pooling_layer=False),
                "head": head,
            }
        )
    fill(network, renamed, owner, "ImageReward")
    return network


def _configs(tensors: Mapping[str, Tensor]) -> tuple[Foreign, Foreign]:
    """What the shapes say, and the published values of what they do not: heads of 64 numbers, the
    small numbers of the norms."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def depth(prefix: str) -> int:
        rule = re.compile(rf"{prefix}\.(\d+)\.")
        return 1 + max((int(m[1]) for key in tensors if (m := rule.match(key))), default=-1)

    width, _, patch, _ = tensors["vision.embeddings.patch_embedding.weight"].shape
    tokens = tensors["vision.embeddings.position_embedding"].shape[1] - 1
    vocabulary, text_width = tensors["text.embeddings.word_embeddings.weight"].shape
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=depth(r"vision\.encoder\.layers"),
        num_attention_heads=width // 64,
        image_size=patch * round(tokens**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(tensors["text.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=depth(r"text\.encoder\.layer"),
        num_attention_heads=text_width // 64,
        max_position_embeddings=len(tensors["text.embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
    return vision, text
