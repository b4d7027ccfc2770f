"""Lumina-Image 2 (separate calls, renormalised, truncated guidance) and Z-Image (lists of rows,
norm cap)."""

from __future__ import annotations

import diffusers
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ZImageControlNetModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, register
from diffalign.testing.tiny.parts import image_vae

SIZE, TEXT, LATENT = 32, 24, 4
Z_IMAGE = [
    f"ZImage{kind}Pipeline"
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")
]


def _lumina2(request: Request) -> Pipeline:
    model = Lumina2Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=LATENT,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        ffn_dim_multiplier=1,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 32, 32),
        cap_feat_dim=TEXT,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(
        transformer=model,
        scheduler=scheduler,
        vae=image_vae(LATENT, shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
    )


def _lumina2_inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    return {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "prompt_attention_mask": draw.ones(b, 7, pad=1),
        "negative_prompt_embeds": draw.normal("negative", b, 7, TEXT),
        "negative_prompt_attention_mask": draw.ones(b, 7, pad=3),
        "cfg_trunc_ratio": 0.5 if request.variant == "truncated" else 1.0,
        "cfg_normalization": request.variant != "plain",
    }


def _z_image(request: Request) -> Pipeline:
    shape: Keywords = {
        "dim": 32,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
    }
    model = ZImageTransformer2DModel(
        in_channels=LATENT,
        n_layers=2,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        rope_theta=256.0,
        **shape,
    )
    parts: Keywords = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(LATENT, shift_factor=0.1),
    }
    if request.has("ControlNet"):
        parts["controlnet"] = ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=2 * LATENT + 1 if request.has("Inpaint") else LATENT,
            **shape,
        )
    return getattr(diffusers, request.name)(
        text_encoder=None, tokenizer=None, transformer=model, **parts
    )


def _z_image_inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": [draw.normal(f"text {row}", 7, TEXT) for row in range(b)],
        "negative_prompt_embeds": [draw.normal(f"negative {row}", 5, TEXT) for row in range(b)],
    }
    if request.variant == "capped":
        inputs |= {"cfg_normalization": 1.0, "cfg_truncation": 0.5}
    if request.has("Img2Img", "Inpaint"):
        inputs["image"] = draw.image("image", b, 3, SIZE, SIZE)
    if request.has("Img2Img") or request.name == "ZImageInpaintPipeline":
        inputs["strength"] = 0.75
    if request.has("Inpaint"):
        inputs["mask_image"] = draw.mask(b, 1, SIZE, SIZE)
    if request.has("ControlNet"):
        inputs["control_image"] = draw.image("control", b, 3, SIZE, SIZE)
    return inputs


def _behind_masked_text(tensor: Tensor, call: Inputs, row: int) -> slice:
    height, width = call["hidden_states"].shape[-2:]
    start = int(call["encoder_attention_mask"][row].sum())
    return slice(start, start + height * width // 4)


def _before_text(tensor: Tensor, call: Inputs, row: int) -> slice:
    height, width = call["x"][row].shape[-2:]
    return slice(0, -(-height * width // 4 // 32) * 32)


register(
    ["Lumina2Pipeline"],
    _lumina2,
    _lumina2_inputs,
    variants=("", "plain", "truncated"),
    hooks=(Hook(r"layers\.\d+\.attn", image=_behind_masked_text),),
)
register(
    Z_IMAGE,
    _z_image,
    _z_image_inputs,
    variants=("", "capped"),
    hooks=(Hook(r"layers\.\d+\.attention", image=_before_text),),
)
