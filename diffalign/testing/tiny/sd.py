"""Stable Diffusion 1.5 and XL: UNets with cross-attention, and their img2img, inpaint and
ControlNet siblings."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    T2IAdapter,
    UNet2DConditionModel,
)

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.parts import clip_text, clip_text_projected, clip_tokenizer, image_vae

SD = "StableDiffusion{}Pipeline"
XL = "StableDiffusionXL{}Pipeline"
KINDS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
UNION = ("ControlNetUnion", "ControlNetUnionImg2Img", "ControlNetUnionInpaint")
WIDTH, TEXT, POOLED, SIZE = 16, 32, 16, 16
NOISE: Keywords = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def unet(request: Request, width: int) -> UNet2DConditionModel:
    """Two levels, one of them with cross-attention; [B, 4 or 9, 8, 8] in, [B, 4, 8, 8] out."""
    extra: Keywords = {}
    if request.has("XL", "Kolors"):
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
            "use_linear_projection": True,
            "transformer_layers_per_block": 2,
        }
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=9 if request.variant == "9ch" else 4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(width, 2 * width),
        layers_per_block=2 if request.params else 1,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )


def _control(request: Request) -> Pipeline:
    model = unet(
        replace(request, variant=""), WIDTH
    )  # ControlNets of inpainting UNets also read 4 channels
    if request.has("Union"):
        return ControlNetUnionModel(
            down_block_types=model.config.down_block_types,
            block_out_channels=model.config.block_out_channels,
            conditioning_embedding_out_channels=(8, 8),
            layers_per_block=1,
            cross_attention_dim=TEXT,
            attention_head_dim=2,
            norm_num_groups=4,
            transformer_layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,
            num_control_type=6,
            num_trans_channel=WIDTH,
            num_trans_head=2,
            num_trans_layer=1,
            num_proj_channel=WIDTH,
        )
    return ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 8))


def _build(request: Request) -> Pipeline:
    model = unet(request, _width(request) if request.params else WIDTH)
    parts: Keywords = {
        "unet": model,
        "vae": image_vae(),
        "text_encoder": None,
        "tokenizer": None,
    }
    if request.text:
        parts |= {
            "text_encoder": clip_text(16 if request.has("XL") else TEXT),
            "tokenizer": clip_tokenizer(),
        }
    if request.has("XL"):
        parts |= {
            "text_encoder_2": None,
            "tokenizer_2": None,
            "scheduler": EulerDiscreteScheduler(**NOISE),
        }
        if request.text:
            parts |= {
                "text_encoder_2": clip_text_projected(16, POOLED),
                "tokenizer_2": clip_tokenizer(),
            }
    else:
        scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)
        parts |= {
            "scheduler": scheduler,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    if request.has("ControlNet"):
        parts["controlnet"] = _control(request)
    if request.has("Adapter"):
        parts["adapter"] = T2IAdapter(
            in_channels=3,
            channels=[WIDTH, 2 * WIDTH],
            num_res_blocks=1,
            downscale_factor=2,
            adapter_type="full_adapter",
        )
    return getattr(diffusers, request.name)(**parts)


def prompts(request: Request) -> Inputs:
    """Strings, one pair per row."""
    rows = range(request.batch)
    return {
        "prompt": [f"a red apple {row}" for row in rows],
        "negative_prompt": [f"blurry {row}" for row in rows],
    }


def images(request: Request, draw: Draw, size: int = SIZE) -> Inputs:
    """Image, mask and control image as the class name asks for; 3 of 4 steps for img2img."""
    picture = draw.image("image", request.batch, 3, size, size)
    control = draw.image("control", request.batch, 3, size, size)
    inputs: Inputs = {}
    if request.has("Img2Img", "Inpaint"):
        inputs |= {"image": picture, "strength": 0.75}
    else:
        inputs |= {"height": size, "width": size}
    if request.has("Inpaint"):
        inputs["mask_image"] = draw.mask(request.batch, 1, size, size)
    if request.has("ControlNet", "Adapter"):
        inputs["control_image" if request.has("Img2Img", "Inpaint", "Union") else "image"] = control
    return inputs


def _inputs(request: Request, draw: Draw) -> Inputs:
    inputs: Inputs = {"guidance_scale": 3.0} | images(request, draw)
    if request.has("Union"):
        inputs |= {"control_image": [inputs["control_image"]], "control_mode": [0]}
    if request.text:
        return inputs | prompts(request)
    inputs |= {
        "prompt_embeds": draw.normal("text", request.batch, 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", request.batch, 7, TEXT),
    }
    if request.has("XL"):
        inputs |= {
            "pooled_prompt_embeds": draw.normal("pooled", request.batch, POOLED),
            "negative_pooled_prompt_embeds": draw.normal("negative pooled", request.batch, POOLED),
        }
    return inputs


def _width(request: Request) -> int:
    width = WIDTH
    with torch.device("meta"):
        while sum(p.numel() for p in unet(request, width).parameters()) < request.params:
            width += 16
    return width


register(
    [SD.format(kind) for kind in KINDS if "Inpaint" not in kind],
    _build,
    _inputs,
    text=True,
    hooks=CROSS,
)
register(
    [SD.format(kind) for kind in KINDS if "Inpaint" in kind],
    _build,
    _inputs,
    variants=("", "9ch"),
    text=True,
    hooks=CROSS,
)
register(
    [XL.format(kind) for kind in KINDS if "Inpaint" not in kind],
    _build,
    _inputs,
    text=True,
    hooks=CROSS,
)
register(
    [XL.format(kind) for kind in KINDS if "Inpaint" in kind],
    _build,
    _inputs,
    variants=("", "9ch"),
    text=True,
    hooks=CROSS,
)
register([XL.format(kind) for kind in UNION], _build, _inputs, text=True, hooks=CROSS)
register([SD.format("Adapter"), XL.format("Adapter")], _build, _inputs, text=True, hooks=CROSS)
