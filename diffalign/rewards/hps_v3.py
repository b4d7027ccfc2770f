"""HPSv3: human preference by a vision-language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import (
    DAMAGED,
    Foreign,
    Source,
    file_of,
    fill,
    silent_start,
    tensors_of,
)
from diffalign.rewards.network import DTYPES, NetworkReward, Placement
from diffalign.rewards.preprocessing import wide
from diffalign.rewards.qwen_images import as_dtype, inputs_of, processor_of

INSTRUCTION = Path(__file__).with_name("hps_v3.txt")
"""What the network was trained to read, byte for byte (github.com/MizzenAI/HPSv3,
hpsv3/dataset/data_collator_qwen.py, MIT licence); another wording gives other scores."""
TOKEN = "<|Reward|>"
"""The token whose last state is scored."""
PIXELS = 256 * 28 * 28
"""Of every image, whatever its size: 448 x 448 where it is square."""
RULES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
    (r"^rm_head\.", "head."),
)
"""From the file's names, those of an older transformers, to today's."""


class HPSv3(NetworkReward):
    """Human preference, third version: Qwen2-VL-7B reads image, prompt and an instruction, and a
    head turns one token into a score.

    The network also says how sure it is, which is not used. Images are scored singly and, unlike
    the authors' code with gradient, resized as the model's own processor does. The best judge here,
    and heavy: for choosing among images rather than inside a loop. ``source``: a hub id, folder or
    file with ``HPSv3.safetensors``; ``base``: configuration and processor of the model.
    Paper: Ma et al. 2025, arXiv:2508.03789. 448 pixels squared, aspect ratio kept.
    """

    name = "hps-v3"
    span = (-5.0, 15.0)
    facts = Facts(
        "Apache-2.0",
        "MizzenAI/HPSv3",
        "8.3 B",
        "16.6 GB + 2",
        "general preference: .77 of pairs on HPDv3, .94 with the order that people give models",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        base: Source = "Qwen/Qwen2-VL-7B-Instruct",
        **placement: Unpack[Placement],
    ) -> None:
        placement.setdefault("dtype", "bf16")
        placement.setdefault("batch", 1)
        self.processor = processor_of(base, self.name, None)
        self.processor.image_processor.size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        self.processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
        self.token = int(self.processor.tokenizer.convert_tokens_to_ids(TOKEN))
        path = file_of(source, ("HPSv3.safetensors",), self.name, revision)
        dtype = DTYPES.get(placement["dtype"], torch.float32)
        super().__init__(self._network(path, base, dtype), **placement)
        if self.dtype != torch.float64:
            self.network["head"].float()
        self.instruction = INSTRUCTION.read_text(encoding="utf-8")

    def _network(self, path: Path, base: Source, dtype: torch.dtype) -> nn.ModuleDict:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        tensors: dict[str, Tensor] = {}
        for name, tensor in tensors_of(path, self.name).items():
            key = name
            for rule, text in RULES:
                key = re.sub(rule, text, key)
            if key != "lm_head.weight":  # it writes words, which nobody asks for
                tensors[key] = tensor
        try:
            config: Foreign = Qwen2VLConfig.from_pretrained(base)
            embedding = tensors["model.language_model.embed_tokens.weight"]
            head = _head([tensors[f"head.{place}.weight"].shape for place in (0, 3, 5)])
        except KeyError as error:
            raise ValueError(
                f"{self.name}: {path.name} is not HPSv3's: {error} is missing."
            ) from error
        except DAMAGED as error:
            raise ValueError(
                f"{self.name}: no configuration of Qwen2-VL at {str(base)!r}: {error}"
            ) from error
        config.text_config.vocab_size = len(embedding)
        if self.token >= len(embedding):
            raise ValueError(
                f"{self.name}: the tokenizer at {str(base)!r} gives {TOKEN} the number "
                f"{self.token}, and {path.name} knows {len(embedding)} tokens."
            )
        with silent_start():
            model = Qwen2VLModel._from_config(config, dtype=dtype)
        network = nn.ModuleDict({"model": model, "head": head})
        fill(network, tensors, self.name, "HPSv3")
        return network

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._one(image, text) for image, text in zip(images, prompts)])

    def _one(self, image: Tensor, prompt: str) -> Tensor:
        text = self.instruction.replace("{text_prompt}", prompt)
        inputs = inputs_of(self.processor, image, text, differentiable=True)
        output = self.network["model"](**as_dtype(inputs, self.dtype), use_cache=False)
        states = output.last_hidden_state[0]
        place = int((inputs["input_ids"][0] == self.token).nonzero()[-1])
        mean: Tensor = self.network["head"](wide(states[place]))[0]
        return mean


def _head(shapes: Sequence[Sequence[int]]) -> nn.Sequential:
    """Three linear layers, with dropout that acts in training only: mean and spread of a score."""
    (first, width), (second, _), (last, _) = shapes
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, last),
    )
