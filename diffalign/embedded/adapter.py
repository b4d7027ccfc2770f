"""A low-rank difference put into the weights of a pipeline, as ``train_turbo`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file

if TYPE_CHECKING:
    from torch import nn

    from diffalign.core.types import Pipeline, Scheduler

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives to an adapter."""


def sampler(scheduler: Scheduler) -> LCMScheduler:
    """The scheduler of a model that goes to the end in every step, and back by new noise."""
    return LCMScheduler.from_config(scheduler.config, set_alpha_to_one=True)


def adapted(pipe: Pipeline, folder: Path) -> Pipeline:
    """The pipeline with the difference and the scheduler of a folder, in place."""
    fuse(pipe.unet, folder / FILE)
    pipe.register_modules(scheduler=LCMScheduler.from_pretrained(folder / "scheduler"))
    return pipe


@torch.no_grad()
def fuse(unet: nn.Module, file: Path) -> None:
    """Add the difference in a LoRA file of diffusers to the weights of a denoiser, in place."""
    table = load_file(file)
    for key, down in table.items():
        if not key.endswith(".lora_A.weight"):
            continue
        up = table[key.replace("lora_A", "lora_B")]
        layer = key.removeprefix("unet.").removesuffix(".lora_A.weight")
        weight = unet.get_submodule(layer).weight
        weight += (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight)
