"""VQAScore as it was published: CLIP-FlanT5."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import (
    DAMAGED,
    Foreign,
    Source,
    file_of,
    fill,
    pretrained,
    tensors_of,
    tokenizer_of,
)
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.preprocessing import MEAN, normalised, resized, wide

BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = '\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
"""What the model was tuned to read before and after the image; the tokenizer ends both parts."""
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class VQAScoreT5(NetworkReward):
    """Geometric mean of the probabilities that CLIP-FlanT5 gives to the tokens of the answer "Yes".

    CLIP ViT-L-14-336 looks at the image, padded to a square with CLIP's mean colour; a small
    network turns what it sees into words for FlanT5. ``source``: ``zhiqiulin/clip-flant5-xl`` or
    ``-xxl``, by hub id or folder; ``vision``: CLIP's, None for what the model names. Use bf16: T5
    overflows in fp16.
    Paper: Lin et al. 2024, arXiv:2404.01291. 336 pixels.
    """

    name = "vqa-score-t5"
    facts = Facts(
        "Apache-2.0",
        "zhiqiulin/clip-flant5-xl",
        "3 B, or 11 B",
        "6.3 GB + 3",
        "complex prompts .64, 2D positions .53, overall .61 (XXL)",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        vision: Source | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

        placement.setdefault("batch", 1)
        if placement.get("dtype") == "fp16":
            raise ValueError(f"{self.name}: T5 overflows in fp16; use bf16 or fp32.")
        try:
            config: Foreign = T5Config.from_pretrained(source, revision=revision)
        except DAMAGED as error:
            raise ValueError(
                f"{self.name}: no configuration of CLIP-FlanT5 at {str(source)!r}: {error}"
            ) from error
        tower = vision or getattr(config, "mm_vision_tower", None)
        if tower is None:
            raise ValueError(
                f"{self.name}: {str(source)!r} names no vision tower; it is a T5 without eyes."
            )
        t5 = pretrained(T5ForConditionalGeneration, source, self.name, revision, config=config)
        clip = pretrained(CLIPVisionModel, tower, self.name)
        width = clip.config.hidden_size
        projector = nn.Sequential(
            nn.Linear(width, config.d_model), nn.GELU(), nn.Linear(config.d_model, config.d_model)
        )
        tensors = _under("mm_projector.", source, self.name, revision)
        fill(projector, tensors, self.name, "CLIP-FlanT5")
        super().__init__(
            nn.ModuleDict({"vision": clip, "projector": projector, "t5": t5}), **placement
        )
        self.side = int(clip.config.image_size)
        self.layer = int(getattr(config, "mm_vision_select_layer", -2))
        self.tokenizer = tokenizer_of(source, self.name, revision)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalised(_squared(images, self.side)).to(self.dtype)
        states = self.network["vision"](pixel_values=pixels, output_hidden_states=True)
        views = self.network["projector"](states.hidden_states[self.layer][:, 1:])
        return torch.stack([self._one(words, text) for words, text in zip(views, prompts)])

    def _one(self, views: Tensor, prompt: str) -> Tensor:
        t5 = self.network["t5"]
        before, after, answer = (
            torch.tensor(self.tokenizer(text).input_ids, device=views.device)
            for text in (BEFORE, AFTER.replace("{prompt}", prompt), "Yes")
        )
        embed = t5.get_input_embeddings()
        inputs = torch.cat([embed(before), views, embed(after)])
        logits = t5(inputs_embeds=inputs[None], labels=answer[None], use_cache=False).logits
        logs = wide(logits[0]).log_softmax(-1)
        return logs.gather(1, answer[:, None]).mean().exp()


def _squared(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] padded to squares with CLIP's mean colour, then resized."""
    height, width = images.shape[-2:]
    more = max(height, width) - height, max(height, width) - width
    y, x = (count // 2 for count in more)
    colour = images.new_tensor(MEAN).view(1, 3, 1, 1)
    padded = F.pad(images - colour, (x, more[1] - x, y, more[0] - y)) + colour
    return resized(padded, side, side)


def _under(prefix: str, source: Source, owner: str, revision: str | None) -> dict[str, Tensor]:
    """The weights below ``prefix`` in the files of a model, which may be several."""
    path = file_of(source, FILES, owner, revision)
    paths = [path]
    if path.suffix == ".json":
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for key, file in places.items() if key.startswith(prefix)})
        folder: Source = source if not Path(source).is_file() else path.parent
        paths = [file_of(folder, (name,), owner, revision) for name in names]
    tensors = [tensors_of(each, owner) for each in paths]
    return {
        name.removeprefix(prefix): tensor
        for table in tensors
        for name, tensor in table.items()
        if name.startswith(prefix)
    }
