"""Stable Diffusion 3: joint attention over text and image tokens, batched branches, pooled text."""

from __future__ import annotations

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, register
from diffalign.testing.tiny.parts import image_vae

SIZE, TEXT, POOLED = 16, 32, 16
NAMES = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting")


def _build(request: Request) -> Pipeline:
    shape: Keywords = {
        "sample_size": SIZE // 2,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    parts: Keywords = {
        "transformer": SD3Transformer2DModel(
            **shape, dual_attention_layers=(0,) if request.variant == "3.5" else ()
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(16, shift_factor=0.1),
    }
    parts |= dict.fromkeys(
        [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    )
    if request.has("ControlNet"):
        extra = 1 if request.has("Inpainting") else 0
        parts["controlnet"] = SD3ControlNetModel(
            **shape | {"num_layers": 1}, extra_conditioning_channels=extra
        )
    return getattr(diffusers, request.name)(**parts)


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", b, 7, TEXT),
        "pooled_prompt_embeds": draw.normal("pooled", b, POOLED),
        "negative_pooled_prompt_embeds": draw.normal("negative pooled", b, POOLED),
    }
    if request.has("Img2Img", "InpaintPipeline"):
        inputs |= {"image": draw.image("image", b, 3, SIZE, SIZE), "strength": 0.75}
    if request.has("InpaintPipeline"):
        inputs["mask_image"] = draw.mask(b, 1, SIZE, SIZE)
    if request.has("ControlNet"):
        inputs["control_image"] = draw.image("control", b, 3, SIZE, SIZE)
    if request.has("Inpainting"):
        inputs["control_mask"] = draw.mask(b, 1, SIZE, SIZE)
    return inputs


register(
    [f"StableDiffusion3{kind}Pipeline" for kind in NAMES],
    _build,
    _inputs,
    variants=("", "3.5"),
    hooks=(Hook(r"transformer_blocks\.\d+\.attn"),),
    deep="3.5",
)
