"""PixArt alpha and sigma: cross-attention to masked T5 text, learned sigma (twice the channels),
batched branches."""

from __future__ import annotations

import diffusers
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.parts import image_vae

SIZE, TEXT = 16, 24


def _build(request: Request) -> Pipeline:
    model = PixArtTransformer2DModel(
        sample_size=SIZE // 2,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=TEXT,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return getattr(diffusers, request.name)(
        tokenizer=None,
        text_encoder=None,
        vae=image_vae(),
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(),
    )


def masked_text(request: Request, draw: Draw, width: int) -> Inputs:
    """Embeddings ``[B, 7, width]`` with masks: the positive prompt fills all 7 tokens but one, the
    negative 4."""
    b = request.batch
    return {
        "prompt_embeds": draw.normal("text", b, 7, width),
        "prompt_attention_mask": draw.ones(b, 7, pad=1),
        "negative_prompt_embeds": draw.normal("negative", b, 7, width),
        "negative_prompt_attention_mask": draw.ones(b, 7, pad=3),
    }


def _inputs(request: Request, draw: Draw) -> Inputs:
    inputs: Inputs = {
        "negative_prompt": None,
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "use_resolution_binning": False,
    }
    return inputs | masked_text(request, draw, TEXT)


# PixArt-alpha's pipeline fails at one step with the scheduler of a learned variance
register(["PixArtAlphaPipeline"], _build, _inputs, hooks=CROSS, deep=None)
register(["PixArtSigmaPipeline"], _build, _inputs, hooks=CROSS)
