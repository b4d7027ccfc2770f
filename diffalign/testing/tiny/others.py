"""DiT (class labels, conditional half first), AuraFlow, HunyuanDiT, Kolors and CogView4."""

from __future__ import annotations

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KolorsPipeline,
)

from diffalign.core.types import Pipeline
from diffalign.testing.tiny import sd
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.parts import image_vae

SIZE, TEXT = 16, 24


def _dit(request: Request) -> Pipeline:
    model = DiTTransformer2DModel(
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    return DiTPipeline(
        transformer=model, vae=image_vae(), scheduler=DDIMScheduler(clip_sample=False)
    )


def _dit_inputs(request: Request, draw: Draw) -> Inputs:
    # this pipeline has no latent output and takes one generator
    labels = [207 + row for row in range(request.batch)]
    return {
        "class_labels": labels,
        "guidance_scale": 3.0,
        "output_type": "np",
        "generator": draw.generator("noise 0"),
    }


def _aura(request: Request) -> Pipeline:
    model = AuraFlowTransformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=TEXT,
        out_channels=4,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(), transformer=model, scheduler=scheduler
    )


def _text(
    request: Request, draw: Draw, suffix: str = "", length: int = 7, *, masks: bool = True
) -> Inputs:
    b = request.batch
    inputs: Inputs = {}
    for name, pad in (("prompt", 1), ("negative_prompt", 3)):
        inputs[f"{name}_embeds{suffix}"] = draw.normal(name + suffix, b, length, TEXT)
        if masks:
            inputs[f"{name}_attention_mask{suffix}"] = draw.ones(b, length, pad=pad)
    return inputs


def _aura_inputs(request: Request, draw: Draw) -> Inputs:
    return {"guidance_scale": 3.0, "height": SIZE, "width": SIZE} | _text(request, draw)


def _hunyuan(request: Request) -> Pipeline:
    model = HunyuanDiT2DModel(
        sample_size=SIZE // 2,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=9,
        activation_fn="gelu-approximate",
    )
    return HunyuanDiTPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _hunyuan_inputs(request: Request, draw: Draw) -> Inputs:
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "use_resolution_binning": False,
    }
    if request.variant == "rescaled":
        inputs["guidance_rescale"] = 0.7
    return inputs | _text(request, draw) | _text(request, draw, "_2", 9)


def _kolors(request: Request) -> Pipeline:
    model = sd.unet(request, sd.WIDTH)
    return KolorsPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=EulerDiscreteScheduler(**sd.NOISE),
    )


def _kolors_inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {"guidance_scale": 3.0} | sd.images(request, draw)
    for name in ("", "negative_"):
        inputs[f"{name}prompt_embeds"] = draw.normal(f"{name}text", b, 7, sd.TEXT)
        inputs[f"{name}pooled_prompt_embeds"] = draw.normal(f"{name}pooled", b, sd.POOLED)
    return inputs


def _cogview4(request: Request) -> Pipeline:
    model = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(
        tokenizer=None, text_encoder=None, vae=image_vae(), transformer=model, scheduler=scheduler
    )


def _cogview4_inputs(request: Request, draw: Draw) -> Inputs:
    return {"guidance_scale": 3.0, "height": SIZE, "width": SIZE} | _text(
        request, draw, masks=False
    )


register(["DiTPipeline"], _dit, _dit_inputs)
register(["AuraFlowPipeline"], _aura, _aura_inputs)
register(["HunyuanDiTPipeline"], _hunyuan, _hunyuan_inputs, variants=("", "rescaled"))
register(["KolorsPipeline"], _kolors, _kolors_inputs, hooks=CROSS)
register(["CogView4Pipeline"], _cogview4, _cogview4_inputs)
