"""Wan 2.1 and 2.2 video: separate calls, cross-attention; two experts, image, video and control
inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, register
from diffalign.testing.tiny.parts import clip_images, clip_vision

SIZE, FRAMES, TEXT, LATENT, CLIP = 32, 5, 24, 4, 16
NAMES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")


def wan_vae() -> AutoencoderKLWan:
    """Factor 8 in space and 4 in time: ``[B, 3, 1 + 4 F, H, W]`` to ``[B, 4, 1 + F, H/8, W/8]``."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 1.5, 0.8, 1.2],
    )


def _transformer(request: Request) -> Pipeline:
    shape: Keywords = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENT,
        "out_channels": LATENT,
        "text_dim": TEXT,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    if request.has("VACE"):
        return WanVACETransformer3DModel(**shape, vace_layers=[0], vace_in_channels=2 * LATENT + 64)
    if request.has("ImageToVideo") and request.variant != "2.2-5b":
        shape["in_channels"] = 2 * LATENT + 4  # noise, first frame, frame mask
        if not request.variant:
            shape |= {"image_dim": CLIP, "added_kv_proj_dim": 24}
    return WanTransformer3DModel(**shape)


def _build(request: Request) -> Pipeline:
    parts: Keywords = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": _transformer(request),
    }
    if request.variant == "2.2":
        parts |= {"transformer_2": _transformer(request), "boundary_ratio": 0.875}
    if request.variant == "2.2-5b":
        parts["expand_timesteps"] = True
    if (
        "image_dim" in parts["transformer"].config
        and parts["transformer"].config.image_dim is not None
    ):
        parts |= {"image_encoder": clip_vision(CLIP), "image_processor": clip_images()}
    return getattr(diffusers, request.name)(**parts)


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    if request.has("VACE") and b > 1:
        raise ValueError(f"WanVACEPipeline makes one video per call; got batch={b}. Use batch=1.")
    # the image branch of 2.1 image-to-video splits the context at 512 text tokens
    long = request.name == "WanImageToVideoPipeline" and not request.variant
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 512 if long else 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", b, 512 if long else 5, TEXT),
    }
    if request.has("VideoToVideo"):
        inputs |= {"video": draw.image("video", b, FRAMES, 3, SIZE, SIZE), "strength": 0.75}
    else:
        inputs["num_frames"] = FRAMES
    if request.has("ImageToVideo"):
        inputs["image"] = draw.image("image", 1, 3, SIZE, SIZE)
    if request.variant == "2.2":
        inputs["guidance_scale_2"] = 2.0
    if request.has("VACE"):
        inputs["generator"] = draw.generator("noise 0")  # lists are refused by the pipeline
    return inputs


def _image_keys(part: Any) -> Callable[[], Tensor] | None:
    """Wan image-to-video adds attention over image keys to the same output: what it adds in the
    running call."""
    if part.add_k_proj is None:
        return None
    outputs: dict[str, Tensor] = {}
    for name in ("norm_q", "norm_added_k", "add_v_proj"):
        getattr(part, name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: output})
        )

    def added() -> Tensor:
        q, k, v = (
            outputs[name].reshape(*outputs[name].shape[:2], part.heads, -1).transpose(1, 2)
            for name in ("norm_q", "norm_added_k", "add_v_proj")
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        image: Tensor = (weights @ v).transpose(1, 2).flatten(2)
        return image

    return added


HOOKS = (Hook(r".*attn2", added=_image_keys),)
register(NAMES[:2], _build, _inputs, variants=("", "2.2", "2.2-5b"), hooks=HOOKS)
register(NAMES[2:], _build, _inputs, variants=("", "2.2"), hooks=HOOKS)
register(["WanVideoToVideoPipeline"], _build, _inputs, hooks=HOOKS)
