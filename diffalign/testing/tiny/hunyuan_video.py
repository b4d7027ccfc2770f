"""HunyuanVideo: joint attention over a video and refined, masked text, two calls."""

from __future__ import annotations

import diffusers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, register

SIZE, TEXT, POOLED, LATENT = 32, 24, 16, 4
TEXTS = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2")]


def _build(request: Request) -> Pipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT * (2 if request.has("ImageToVideo") else 1),
        out_channels=LATENT,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 2, 2),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return getattr(diffusers, request.name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        **dict.fromkeys(TEXTS),
    )


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 6.0,
        "true_cfg_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": 9,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "prompt_attention_mask": draw.ones(b, 7, pad=1),
        "pooled_prompt_embeds": draw.normal("pooled", b, POOLED),
        "negative_prompt_embeds": draw.normal("negative", b, 5, TEXT),
        "negative_prompt_attention_mask": draw.ones(b, 5, pad=2),
        "negative_pooled_prompt_embeds": draw.normal("negative pooled", b, POOLED),
    }
    if request.has("ImageToVideo"):
        inputs["image"] = draw.image("image", b, 3, SIZE, SIZE)
    return inputs


register(
    ["HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"],
    _build,
    _inputs,
    hooks=(
        Hook(r"transformer_blocks\.\d+\.attn"),
        # its attention returns video and text by themselves
        Hook(r"single_transformer_blocks\.\d+\.attn", inner=""),
    ),
)
