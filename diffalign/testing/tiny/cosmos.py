"""Cosmos Predict 2: separate calls, guidance on denoised latents in EDM form."""

from __future__ import annotations

from typing import TypeVar

import diffusers
from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.wan import LATENT, wan_vae

SIZE, TEXT = 32, 24


T = TypeVar("T")


class AllowAll:
    """Stands in for the content filter, which the pipeline demands as an object and which is a
    separate package."""

    def to(self, device: str) -> AllowAll:
        """Nothing to move."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Accept."""
        return True

    def check_video_safety(self, frames: T) -> T:
        """Return the frames as they are."""
        return frames


def _build(request: Request) -> Pipeline:
    video = request.has("VideoToWorld")
    model = CosmosTransformer3DModel(
        in_channels=LATENT + 1 if video else LATENT,  # the condition mask is one more channel
        out_channels=LATENT,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )
    return getattr(diffusers, request.name)(
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=AllowAll(),
    )


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", b, 5, TEXT),
    }
    if request.has("VideoToWorld"):
        inputs |= {"image": draw.image("image", b, 3, SIZE, SIZE), "num_frames": 5}
    return inputs


register(
    ["Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"], _build, _inputs, hooks=CROSS
)
