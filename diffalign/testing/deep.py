"""Tiny pipelines with more transformer blocks, and the same without one: the oracle of everything
that skips blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.families import FAMILIES
from diffalign.seams.blocks.sites import sites
from diffalign.testing.tiny import tiny_pipeline
from diffalign.testing.tiny.base import randomise

# one class per family; every one has its own blocks, stream order or row
PIPELINES = {
    "StableDiffusionPipeline": "",
    "StableDiffusionXLPipeline": "",
    "StableDiffusion3Pipeline": "3.5",
    "PixArtSigmaPipeline": "",
    "SanaPipeline": "",
    "FluxPipeline": "",
    "QwenImagePipeline": "",
    "ChromaPipeline": "",
    "WanPipeline": "",
    "LTXPipeline": "",
    "CogVideoXPipeline": "rotary",
    "Lumina2Pipeline": "",
    "ZImagePipeline": "",
    "DiTPipeline": "",
    "Cosmos2TextToImagePipeline": "",
}


def deep_pipeline(name: str, variant: str = "", *, extra: int = 2) -> Any:
    """``tiny_pipeline(name)`` with ``extra`` more blocks in each stack, every one with weights of
    its own; U-Nets have enough already."""
    pipe, rng = tiny_pipeline(name, variant=variant), torch.Generator().manual_seed(7)
    for attribute in FAMILIES[name].denoisers:
        module = getattr(pipe, attribute, None)
        if module is None or attribute == "unet":
            continue
        if (
            name == "ChromaPipeline"
        ):  # one network makes the modulation of all blocks, so their number is part of the model
            module = type(module).from_config(
                {**module.config, "num_layers": 1 + extra, "num_single_layers": 1 + extra}
            )
            randomise(module, rng)
            setattr(pipe, attribute, module.eval())
            continue
        for stack in {site.name.rpartition(".")[0]: None for site in sites(module)}:
            blocks: Any = module.get_submodule(stack)
            for _ in range(extra):
                block = copy.deepcopy(blocks[0])
                randomise(block, rng)
                blocks.insert(1, block)
    return pipe


def without_block(pipe: Any, block: str) -> Any:
    """A copy of the pipeline whose first denoiser really lacks the block of that name."""
    shorter = copy.deepcopy(pipe)
    module = getattr(shorter, FAMILIES[type(pipe).__name__].denoisers[0])
    stack, _, index = block.rpartition(".")
    blocks: Any = module.get_submodule(stack)
    if type(pipe).__name__ == "ChromaPipeline":
        blocks[int(index)] = _Nothing(single=stack.startswith("single"))
    else:
        del blocks[int(index)]
    return shorter


class _Nothing(nn.Module):
    """What stands for a block of Chroma, whose other blocks would change if the stack were shorter."""

    def __init__(self, single: bool) -> None:
        super().__init__()
        self.single = single

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any
    ) -> Any:
        return hidden_states if self.single else (encoder_hidden_states, hidden_states)
