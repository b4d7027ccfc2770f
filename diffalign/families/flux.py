"""Flux.1: text before the image in one attention; two calls, or guidance as an input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.families.arithmetic import first_tokens, per_thousand
from diffalign.families.family import IMAGE, TEXT, Family, entries
from diffalign.families.layout import TokenPlaces, each_table, position_grid
from diffalign.families.text import TEXT_POOLED, Argument, Encoder, SecondText, TextLayers


def embedded_guidance(pipe: Any) -> str:
    return (
        "guidance is distilled into the model (guidance_scale is an input): there is no "
        "unconditional branch to guide with; use NAG."
    )


FLUX = Family(
    "flux",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
    ),
    mode="sequential",
    gates=("true_cfg_scale",),
    needs_negative=True,
    time=per_thousand,
    packed=True,
    grid=position_grid,
    text=(Argument("encoder_hidden_states", positions="txt_ids"),),
    encoder=Encoder(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), TEXT_POOLED),
    attention=TextLayers(r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
    tokens=TokenPlaces(
        embed="x_embedder",
        out="proj_out",
        image=r"transformer_blocks\.\d+\.(attn\.to_(?!add).*|ff\..*)|proj_out",
        text=r"transformer_blocks\.\d+\.(attn\.(add_|to_add).*|ff_context\..*)",
        both=r"single_transformer_blocks\.\d+\.(attn\.to_.*|proj_mlp|proj_out)",
        rotary={"image_rotary_emb": each_table},
    ),
    second_text=SecondText(
        image_stack="single_transformer_blocks",
        image_modules=r"transformer_blocks\.\d+\.(ff|attn\.(to_[qkv]|to_qkv|to_out\.0))",
        pooled="pooled_projections",
    ),
    blocks={
        "FluxTransformerBlock": (TEXT, IMAGE),
        "FluxSingleTransformerBlock": (TEXT, IMAGE),
    },
    defaults={
        "nag": (
            *entries(
                "Chen et al. 2025 (arXiv:2505.21179), table 5, Flux (phi 4)",
                scale=5.0,
                tau=2.5,
                alpha=0.25,
            ),
            *entries("public NAG workflow for Flux", {"flow": True}, sigma=(0.75, math.inf)),
        )
    },
)


def image_tokens(arguments: Mapping[str, Any]) -> slice:
    """Tokens of the image that is made: those of the reference have 1 in the first column."""
    return slice(0, int((arguments["img_ids"][:, 0] == 0).sum()))


KONTEXT = replace(
    FLUX,
    seen=image_tokens,
    tokens=None,
    refusals={
        "cat": "its tokens are those of the image and of a reference, and which of them may be "
        "left out is not known."
    },
    pipelines=("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
    to_step=first_tokens,
    defaults={
        "nag": (
            *FLUX.defaults["nag"],
            *entries(
                "public NAG workflow for Flux Kontext",
                {"pipeline": "FluxKontextPipeline"},
                scale=3.0,
            ),
        )
    },
)
DISTILLED = replace(
    FLUX,
    pipelines=(
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    mode="single",
    gates=(),
    needs_negative=False,
    check=embedded_guidance,
)
