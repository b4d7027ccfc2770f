"""Chroma: a pruned Flux with classifier-free guidance in two calls and masked text."""

from __future__ import annotations

import math

from diffalign.families.arithmetic import per_thousand
from diffalign.families.family import IMAGE, TEXT, Family, entries
from diffalign.families.layout import TokenPlaces, each_table, position_grid
from diffalign.families.text import Argument, Encoder, SecondText, TextLayers

SOURCE = "public NAG workflow for Chroma"

CHROMA = Family(
    "chroma",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    mode="sequential",
    time=per_thousand,
    packed=True,
    grid=position_grid,
    # the mask goes on over the image tokens
    text=(Argument("encoder_hidden_states", mask="attention_mask", positions="txt_ids"),),
    encoder=Encoder(
        (
            "prompt_embeds",
            "text_ids",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_ids",
            "negative_prompt_attention_mask",
        ),
        {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "attention_mask"},
    ),
    attention=TextLayers(r"(single_)?transformer_blocks\.\d+\.attn", "joint"),
    tokens=TokenPlaces(
        embed="x_embedder",
        out="proj_out",
        image=r"transformer_blocks\.\d+\.(attn\.to_(?!add).*|ff\..*)|proj_out",
        text=r"transformer_blocks\.\d+\.(attn\.(add_|to_add).*|ff_context\..*)",
        both=r"single_transformer_blocks\.\d+\.(attn\.to_.*|proj_mlp|proj_out)",
        masks=("attention_mask",),
        rotary={"image_rotary_emb": each_table},
    ),
    second_text=SecondText(),
    blocks={
        "ChromaTransformerBlock": (TEXT, IMAGE),
        "ChromaSingleTransformerBlock": (IMAGE,),
    },
    defaults={
        "nag": (
            *entries(SOURCE, scale=5.0, tau=2.5, alpha=0.25),
            *entries(SOURCE, {"flow": True}, sigma=(0.75, math.inf)),
        )
    },
)
