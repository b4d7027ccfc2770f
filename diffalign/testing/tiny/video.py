"""LTX-Video and CogVideoX: batched branches over packed or spatial video latents."""

from __future__ import annotations

import diffusers
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Hook, Inputs, Request, behind_text, register
from diffalign.testing.tiny.pixart import masked_text

SIZE, TEXT, LATENT = 32, 24, 4
LTX = ["LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"]
COG = [f"CogVideoX{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "FunControl")]


def _ltx_vae() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def _ltx(request: Request) -> Pipeline:
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=request.name != "LTXConditionPipeline", shift_terminal=0.1
    )
    return getattr(diffusers, request.name)(
        transformer=model, scheduler=scheduler, vae=_ltx_vae(), text_encoder=None, tokenizer=None
    )


def _ltx_inputs(request: Request, draw: Draw) -> Inputs:
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": 9,
        "frame_rate": 25,
    }
    if request.variant == "rescaled":
        inputs["guidance_rescale"] = 0.7
    if request.has("ImageToVideo", "Condition"):
        batch = 1 if request.has("Condition") else request.batch
        inputs["image"] = draw.image("image", batch, 3, SIZE, SIZE)
    return inputs | masked_text(request, draw, TEXT)


def _cog_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=LATENT,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _cog(request: Request) -> Pipeline:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=LATENT * (2 if request.has("ImageToVideo", "FunControl") else 1),
        out_channels=LATENT,
        time_embed_dim=4,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=SIZE // 8,
        sample_height=SIZE // 8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=request.variant == "rotary",
    )
    return getattr(diffusers, request.name)(
        tokenizer=None,
        text_encoder=None,
        vae=_cog_vae(),
        transformer=model,
        scheduler=CogVideoXDDIMScheduler(rescale_betas_zero_snr=True),
    )


def _cog_inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", b, 7, TEXT),
    }
    if request.variant == "dynamic":
        inputs["use_dynamic_cfg"] = True
    if request.has("VideoToVideo"):
        inputs |= {"video": draw.image("video", b, 9, 3, SIZE, SIZE), "strength": 0.75}
    elif request.has("FunControl"):
        inputs["control_video"] = draw.image("video", b, 9, 3, SIZE, SIZE)
    else:
        inputs["num_frames"] = 9
    if request.has("ImageToVideo"):
        inputs["image"] = draw.image("image", b, 3, SIZE, SIZE)
    return inputs


register(LTX, _ltx, _ltx_inputs, variants=("", "rescaled"), hooks=CROSS)
register(
    COG,
    _cog,
    _cog_inputs,
    variants=("", "rotary", "dynamic"),
    hooks=(Hook(r"transformer_blocks\.\d+\.attn1", image=behind_text),),
    deep="rotary",
)
