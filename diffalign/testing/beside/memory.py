"""What saves memory: offloading, casting, quantised weights, sliced attention, tiled decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffalign.core.types import Pipeline
from diffalign.testing.beside.base import (
    Arguments,
    Neighbour,
    Refusal,
    by_name,
    denoiser_of,
    nothing,
)

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD3, FLUX, WAN = "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"
CPU = torch.device("cpu")
STORED = torch.float8_e4m3fn


@contextmanager
def resident(pipe: Pipeline) -> Iterator[Arguments]:
    """Everything where it is."""
    yield nothing


@contextmanager
def group_offload(
    pipe: Pipeline, kind: Literal["leaf_level", "block_level"]
) -> Iterator[Arguments]:
    """Groups of layers that come to the device when they are called."""
    model = getattr(pipe, denoiser_of(pipe))
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=CPU, offload_type=kind, **groups)
    yield nothing


@contextmanager
def model_offload(pipe: Pipeline) -> Iterator[Arguments]:
    """Whole models that come to the device, here the CPU itself."""
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        yield nothing
    finally:
        pipe.remove_all_hooks()


@contextmanager
def sequential_offload(pipe: Pipeline) -> Iterator[Arguments]:
    """What ``enable_sequential_cpu_offload``, which wants an accelerator, does to each model."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for model in models:
        cpu_offload(model, CPU, offload_buffers=bool(model._parameters))
    try:
        yield nothing
    finally:
        for model in models:
            remove_hook_from_module(model, recurse=True)


@contextmanager
def layerwise_casting(pipe: Pipeline) -> Iterator[Arguments]:
    """Weights stored in eight bits, cast for each call of a layer."""
    model = getattr(pipe, denoiser_of(pipe))
    model.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=torch.float32)
    yield nothing


@contextmanager
def rounded(pipe: Pipeline) -> Iterator[Arguments]:
    """The weights that layerwise casting computes with, resident in float32."""
    model = getattr(pipe, denoiser_of(pipe))
    other = copy.deepcopy(model)
    other.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=torch.float32)
    for name, layer in other.named_modules():
        registry = vars(layer).get("_diffusers_hook")
        if registry is not None and registry.get_hook("layerwise_casting") is not None:
            model.get_submodule(name).to(STORED).to(torch.float32)
    yield nothing


@contextmanager
def quantised(pipe: Pipeline) -> Iterator[Arguments]:
    """Weights of linear layers in eight bits each, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(getattr(pipe, denoiser_of(pipe)), Int8WeightOnlyConfig())
    yield nothing


@contextmanager
def dequantised(pipe: Pipeline) -> Iterator[Arguments]:
    """The weights that those eight bits stand for, in float32."""
    model = getattr(pipe, denoiser_of(pipe))
    with quantised(pipe) as arguments:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        yield arguments


@contextmanager
def sliced(pipe: Pipeline) -> Iterator[Arguments]:
    """Attention computed slice by slice."""
    pipe.enable_attention_slicing(1)
    try:
        yield nothing
    finally:
        pipe.disable_attention_slicing()


@contextmanager
def tiled(pipe: Pipeline) -> Iterator[Arguments]:
    """The decoder works on tiles and one image at a time."""
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    try:
        yield lambda part: {"output_type": "pt"}
    finally:
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()


@contextmanager
def whole(pipe: Pipeline) -> Iterator[Arguments]:
    """The decoder on whole images."""
    yield lambda part: {"output_type": "pt"}


OFFLOAD, WEIGHTS, PARTS = "Offloading", "Weights in fewer bits", "Slices and tiles"
MODELS = (SD, FLUX, WAN, SD3, SDXL)
NEIGHBOURS = [
    Neighbour(
        name="group offload, leaves",
        group=OFFLOAD,
        pipelines=MODELS,
        put=partial(group_offload, kind="leaf_level"),
        without=resident,
        bound=0.0,
    ),
    Neighbour(
        name="group offload, blocks",
        group=OFFLOAD,
        pipelines=MODELS,
        put=partial(group_offload, kind="block_level"),
        without=resident,
        bound=0.0,
    ),
    Neighbour(
        name="model offload",
        group=OFFLOAD,
        pipelines=MODELS,
        put=model_offload,
        without=resident,
        bound=0.0,
    ),
    Neighbour(
        name="sequential offload",
        group=OFFLOAD,
        pipelines=MODELS,
        put=sequential_offload,
        without=resident,
        bound=0.0,
        refusals=(Refusal(by_name("linear-ag"), "Use enable_model_cpu_offload instead"),),
    ),
    Neighbour(
        name="layerwise casting",
        group=WEIGHTS,
        pipelines=MODELS,
        put=layerwise_casting,
        without=rounded,
        bound=0.0,
    ),
    Neighbour(
        name="int8 weights of torchao",
        group=WEIGHTS,
        pipelines=MODELS,
        put=quantised,
        without=dequantised,
    ),
    Neighbour(
        name="attention slicing",
        group=PARTS,
        pipelines=(SD, SDXL),
        put=sliced,
        without=resident,
    ),
    Neighbour(
        name="tiled and sliced VAE",
        group=PARTS,
        pipelines=(SD, SDXL, FLUX),
        put=tiled,
        without=whole,
    ),
]
