"""Stable Diffusion 1 and 2, SDXL and Kolors: a U-Net, both branches in one batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from diffalign.families.family import IMAGE, RESCALE, Family, entries
from diffalign.families.text import POOLED, Encoder, SecondText, TextLayers

PAPER = "Chen et al. 2025 (arXiv:2505.21179), table 5"
APG = "Sadat et al. 2024 (arXiv:2410.02416)"
NOISE = {"flow": False}


def distilled(pipe: Any) -> str | None:
    if getattr(pipe.unet.config, "time_cond_proj_dim", None) is None:
        return None
    return (
        "this U-Net is guidance-distilled (time_cond_proj_dim is set): there is no unconditional "
        "branch to guide with; use NAG."
    )


SD = Family(
    "sd",
    live_scale=True,
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    ),
    denoisers=("unet",),
    options=(RESCALE,),
    check=distilled,
    encoder=Encoder(),
    attention=TextLayers(r".*transformer_blocks\.\d+\.attn2", "cross"),
    self_attention=r".*transformer_blocks\.\d+\.attn1",
    second_text=SecondText(),
    blocks={"BasicTransformerBlock": (IMAGE,)},
    refusals={"cat": "the convolutions of a U-Net need every position. Use da.AdaptiveGuidance."},
    defaults={
        "nag": (
            *entries(f"{PAPER}, SD1.5 (phi 2)", scale=3.0, tau=2.5, alpha=0.375),
            *entries("public NAG workflow for SD1.5", NOISE, sigma=(4.0, math.inf)),
        ),
        "apg": entries(
            f"{APG}, Stable Diffusion 2.1, as read in summaries of the paper",
            cap=7.5,
            momentum=-0.75,
        ),
    },
)
SDXL = replace(
    SD,
    name="sdxl",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    modular=("StableDiffusionXLModularPipeline",),
    encoder=Encoder(POOLED),  # the pooled text goes into added_cond_kwargs, a dictionary
    defaults={
        "nag": (
            *entries(f"{PAPER}, SDXL (phi 2)", scale=3.0, tau=2.5, alpha=0.5),
            *entries("public NAG workflow for SDXL", NOISE, sigma=(4.0, math.inf)),
        ),
        "apg": entries(f"{APG}, SDXL, as read in summaries of the paper", cap=15.0, momentum=-0.5),
    },
)
KOLORS = replace(
    SDXL,
    name="kolors",
    pipelines=("KolorsPipeline",),
    modular=(),
    options=(),
    defaults={"nag": entries(f"{PAPER}, SDXL (phi 2)", scale=3.0, tau=2.5, alpha=0.5)},
)
# these read their scale once
SD_FIXED = replace(
    SD,
    pipelines=(
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
    ),
    options=(),
    live_scale=False,
)
SDXL_FIXED = replace(
    SDXL,
    pipelines=(
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
    ),
    modular=(),
    live_scale=False,
)
