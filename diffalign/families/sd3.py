"""Stable Diffusion 3 and 3.5: text behind the image in one attention, branches in one batch."""

from __future__ import annotations

import math

from diffalign.families.family import IMAGE, TEXT, Family, entries
from diffalign.families.layout import TokenPlaces
from diffalign.families.text import POOLED, TEXT_POOLED, Encoder, SecondText, TextLayers

SD3 = Family(
    "sd3",
    live_scale=True,
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    modular=("StableDiffusion3ModularPipeline",),
    refuses={
        "skip_guidance_layers": (
            "the pipeline's own skip-layer call would be mixed with the guided result; use "
            "da.SkipLayerGuidance."
        )
    },
    encoder=Encoder(POOLED, TEXT_POOLED),
    attention=TextLayers(r"transformer_blocks\.\d+\.attn", "joint", text="last"),
    # the second attention of SD3.5 medium
    self_attention=r"transformer_blocks\.\d+\.attn2",
    tokens=TokenPlaces(
        embed="pos_embed",
        out="proj_out",
        image=r"transformer_blocks\.\d+\.(attn2?\.to_(?!add).*|ff\..*)|proj_out",
        text=r"transformer_blocks\.\d+\.(attn\.(add_|to_add).*|ff_context\..*)",
    ),
    second_text=SecondText(tokens=r"context_embedder|transformer_blocks\.\d+\.ff_context"),
    blocks={"JointTransformerBlock": (TEXT, IMAGE)},
    defaults={
        "nag": (
            *entries(
                "Chen et al. 2025 (arXiv:2505.21179), table 5, SD3.5-Large (phi 4)",
                scale=5.0,
                tau=2.5,
                alpha=0.125,
            ),
            *entries("public NAG workflow for SD3.5", {"flow": True}, sigma=(0.75, math.inf)),
        ),
        # SD3.5 medium: a second attention in the first 13 of its 24 blocks
        "skip-layer-guidance": entries(
            "published for SD3.5 medium",
            {"num_layers": 24, "dual_attention": True},
            layers=(7, 8, 9),
        ),
    },
)
