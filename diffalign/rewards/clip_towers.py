"""The two towers of a CLIP model, from either published format, and rewards that compare them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.words import Words
from diffalign.rewards.checkpoint import (
    Foreign,
    Source,
    file_of,
    fill,
    pretrained,
    silent_start,
    tensors_of,
)
from diffalign.rewards.network import NetworkReward, Placement, warn_of_cut
from diffalign.rewards.preprocessing import Fit, fitted, normalised, wide
from diffalign.seams.words import clip_tower

VOCABULARY, CONTEXT, END = 49408, 77, 49407
"""Of OpenAI's byte pair encoding, which all of these models share, and their text length."""
HEAD = {"vision": 80, "text": 64}
"""Width of an attention head of ViT-H-14's towers, which a file of weights does not say."""


class ImageTower(nn.Module):
    """Pixels [B, 3, side, side] to features [B, D]."""

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.projection(self.model(pixel_values=pixels).pooler_output)
        return features

    def tokens(self, pixels: Tensor) -> Tensor:
        """All tokens [B, N, D] of the last layer, projected, without the final normalisation."""
        features: Tensor = self.projection(self.model(pixel_values=pixels).last_hidden_state)
        return features


class TextTower(nn.Module):
    """Token ids [B, 77] to features [B, D], read at the first end token."""

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def forward(self, ids: Tensor) -> Tensor:
        ends = (ids == END).int().argmax(-1)
        return self.tokens(ids)[torch.arange(len(ids)), ends]

    def tokens(self, ids: Tensor) -> Tensor:
        """All tokens [B, 77, D], projected."""
        features: Tensor = self.projection(self.model(input_ids=ids).last_hidden_state)
        return features


@dataclass
class Towers:
    """A CLIP model in parts."""

    image: ImageTower
    text: TextTower
    # the learned factor of the cosine, about 100
    scale: float
    # of the images, in pixels
    side: int

    @classmethod
    def of(cls, model: Foreign) -> Towers:
        """The parts of a transformers ``CLIPModel``."""
        return cls(
            ImageTower(model.vision_model, model.visual_projection),
            TextTower(model.text_model, model.text_projection),
            float(model.logit_scale.detach().double().exp()),
            int(model.config.vision_config.image_size),
        )


def load_towers(
    source: Source, owner: str, revision: str | None = None, names: tuple[str, ...] = ()
) -> Towers:
    """A CLIP model from a hub id or folder in transformers' format, or from a file in open_clip's:
    ``source`` itself, or one of ``names`` in that folder or repository."""
    from transformers import CLIPModel

    if names or Path(source).is_file():
        path = file_of(source, names, owner, revision)
        tensors = renamed_from_open_clip(tensors_of(path, owner))
        return Towers.of(model_of(tensors, owner))
    model = pretrained(CLIPModel, source, owner, revision)
    vocabulary = model.config.text_config.vocab_size
    if vocabulary != VOCABULARY:
        raise ValueError(
            f"{owner}: the text tower of {str(source)!r} has {vocabulary} tokens; expected "
            f"CLIP's {VOCABULARY}."
        )
    return Towers.of(model)


def model_of(tensors: Mapping[str, Tensor], owner: str) -> nn.Module:
    """A ``CLIPModel`` with these weights, in transformers' names, of a ViT-H-14 or a smaller one of
    its kind. Raises: ValueError where the file is not of such a model."""
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig(**_config(tensors))
    except (KeyError, ZeroDivisionError) as error:
        raise ValueError(
            f"{owner}: the file is not that of a CLIP model with a vision transformer: {error} is "
            "missing."
        ) from error
    with silent_start():
        model: nn.Module = CLIPModel(config)
    fill(model, tensors, owner, "a CLIP model")
    return model.eval()


def _config(tensors: Mapping[str, Tensor]) -> dict[str, Foreign]:
    """The shapes say all but the width of a head and the activation."""

    def tower(name: str, width: int) -> dict[str, Foreign]:
        layers = f"{name}_model.encoder.layers."
        rule = re.compile(rf"{re.escape(layers)}(\d+)\.")
        return {
            "hidden_size": width,
            "intermediate_size": len(tensors[f"{layers}0.mlp.fc1.bias"]),
            "num_hidden_layers": 1 + max(int(m[1]) for key in tensors if (m := rule.match(key))),
            "num_attention_heads": width // HEAD[name],
            "hidden_act": "gelu",
        }

    width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = tensors["text_model.embeddings.token_embedding.weight"].shape
    places = len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1
    vision = {"patch_size": patch, "image_size": patch * round(places**0.5)}
    context = len(tensors["text_model.embeddings.position_embedding.weight"])
    text = {"vocab_size": vocabulary, "max_position_embeddings": context}
    return {
        "projection_dim": len(tensors["text_projection.weight"]),
        "vision_config": tower("vision", width) | vision,
        "text_config": tower("text", text_width) | text,
    }


RULES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
"""From open_clip's names to transformers', applied in this order."""


def renamed_from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names; queries, keys and values apart."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue
        key = name
        for rule, text in RULES:
            key = re.sub(rule, text, key)
        if ".in_proj_" in key:
            stem, _, kind = key.rpartition("in_proj_")
            for part, values in zip("qkv", tensor.chunk(3)):
                renamed[f"{stem}{part}_proj.{kind}"] = values
        else:
            renamed[key] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return renamed


@cache
def _tokenizer() -> Foreign:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT)


def token_ids(prompts: Sequence[str], owner: str) -> Tensor:
    """Token ids [B, 77] of CLIP's byte pair encoding, padded with 0; warns where one is cut."""
    tokenizer = _tokenizer()
    for prompt in prompts:
        warn_of_cut(owner, prompt, len(tokenizer.encode(prompt)) + 2, CONTEXT)
    ids: Tensor = tokenizer(list(prompts))
    return ids


class ClipReward(NetworkReward):
    """``factor x cos(image, prompt)`` of a CLIP model.

    The text tower stays on the CPU and reads each prompt once. ``factor`` None is the model's own,
    about 100.
    """

    factor: float | None = None
    fit: Fit = "crop"

    def __init__(self, towers: Towers, **placement: Unpack[Placement]) -> None:
        super().__init__(towers.image, **placement)
        self.side = towers.side
        self.text = towers.text.eval().requires_grad_(False)
        if self.dtype == torch.float64:
            self.text.double()
        self.scale = towers.scale if self.factor is None else self.factor
        self._texts: dict[str, Tensor] = {}

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of prompts, on the CPU; each prompt is read once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            with torch.no_grad():
                features = F.normalize(self.text(token_ids(new, self.name)), dim=-1)
            self._texts |= dict(zip(new, features))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    @cached_property
    def words(self) -> Words:
        """The vocabulary of the text tower, for methods that write texts."""
        layer = self.text.model.get_submodule("embeddings.token_embedding")
        return clip_tower(layer, self.text, _tokenizer())

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features [B, D] of images."""
        pixels = normalised(fitted(images, self.side, self.fit))
        return F.normalize(wide(self.network(pixels.to(self.dtype))), dim=-1)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.image_features(images)
        return self.scale * (features * self.texts(prompts).to(features)).sum(-1)
