"""Sana: linear self-attention, cross-attention to masked text, a deep-compression autoencoder, flow
matching."""

from __future__ import annotations

import diffusers
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
)

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.pixart import masked_text

SIZE, TEXT = 32, 24


def _vae() -> AutoencoderDC:
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.5,
    )


def _build(request: Request) -> Pipeline:
    shape: Keywords = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
        "sample_size": SIZE // 4,
    }
    parts: Keywords = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _vae(),
        "transformer": SanaTransformer2DModel(**shape, num_layers=2),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    if request.has("ControlNet"):
        parts["controlnet"] = SanaControlNetModel(**shape, num_layers=1)
    return getattr(diffusers, request.name)(**parts)


def _inputs(request: Request, draw: Draw) -> Inputs:
    inputs: Inputs = {
        "negative_prompt": None,
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "use_resolution_binning": False,
    }
    if request.has("ControlNet"):
        inputs["control_image"] = draw.image("control", request.batch, 3, SIZE, SIZE)
    return inputs | masked_text(request, draw, TEXT)


register(["SanaPipeline", "SanaControlNetPipeline"], _build, _inputs, hooks=CROSS)
