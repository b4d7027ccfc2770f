"""Qwen-Image: separate calls, masked text of any length, renormalised guidance; img2img, inpaint,
ControlNet and edit siblings."""

from __future__ import annotations

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from PIL import Image

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, register

SIZE, TEXT, LATENT = 32, 24, 4
PLAIN = [
    f"QwenImage{kind}Pipeline"
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")
]
EDIT = ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"]


def qwen_vae(levels: int = 4) -> AutoencoderKLQwenImage:
    """Factor 8 for 4 levels: ``[B, 3, 1, H, W]`` to ``[B, 4, 1, H/8, W/8]``."""
    return AutoencoderKLQwenImage(
        base_dim=4 if levels == 4 else 2,
        z_dim=LATENT,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 3) + [True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 1.5, 0.8, 1.2],
    )


def _build(request: Request) -> Pipeline:
    shape: Keywords = {
        "patch_size": 2,
        "in_channels": 4 * LATENT,
        "out_channels": LATENT,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
    }
    # edit pipelines enlarge every image to a million pixels, hence their deeper autoencoder
    parts: Keywords = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": qwen_vae(7 if request.has("Edit") else 4),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": QwenImageTransformer2DModel(**shape),
    }
    if request.has("Edit"):
        parts["processor"] = None
    if request.has("ControlNet"):
        extra = 4 if request.has("Inpaint") else 0  # the packed mask
        parts["controlnet"] = QwenImageControlNetModel(
            **shape | {"num_layers": 1}, extra_condition_channels=extra
        )
    return getattr(diffusers, request.name)(**parts)


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "true_cfg_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "prompt_embeds_mask": draw.ones(b, 7, pad=1),
        "negative_prompt_embeds": draw.normal("negative", b, 5, TEXT),
        "negative_prompt_embeds_mask": draw.ones(b, 5, pad=2),
    }
    if request.has("Edit"):
        if request.has("Plus") and b > 1:
            raise ValueError(
                f"QwenImageEditPlusPipeline makes one image per call; got batch={b}. Use batch=1."
            )
        pixels = (255 * draw.image("image", 40, 48, 3)).to(torch.uint8).numpy()
        inputs |= {"image": [Image.fromarray(pixels)], "height": 8 * SIZE, "width": 8 * SIZE}
    elif request.has("Img2Img") or request.name == "QwenImageInpaintPipeline":
        inputs["image"] = draw.image("image", b, 3, SIZE, SIZE)
    if request.has("Img2Img", "Inpaint") and not request.has("ControlNet"):
        inputs["strength"] = 0.75
    if request.has("Inpaint"):
        inputs["control_mask" if request.has("ControlNet") else "mask_image"] = draw.mask(
            b, 1, SIZE, SIZE
        )
    if request.has("ControlNet"):
        inputs["control_image"] = draw.image("control", b, 3, SIZE, SIZE)
    return inputs


HOOKS = (Hook(r"transformer_blocks\.\d+\.attn"),)
register(PLAIN, _build, _inputs, hooks=HOOKS)
register(EDIT, _build, _inputs, slow=True, hooks=HOOKS)
