"""HunyuanVideo: refined text behind the video in one attention; guidance as an input, and two calls
with a true scale."""

from __future__ import annotations

from diffalign.families.family import IMAGE, TEXT, Family
from diffalign.families.text import Argument, Encoder, SecondText, TextLayers, always

HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    pipelines=("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
    mode="sequential",
    gates=("true_cfg_scale",),
    needs_negative=True,
    text=(Argument("encoder_hidden_states", mask="encoder_attention_mask"),),
    encoder=Encoder(
        ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        {
            "prompt_embeds": "encoder_hidden_states",
            "pooled_prompt_embeds": "pooled_projections",
            "prompt_attention_mask": "encoder_attention_mask",
        },
    ),
    attention=TextLayers(r"(single_)?transformer_blocks\.\d+\.attn", "joint", text="last"),
    # a refiner mixes the tokens of a text, and padding must stand behind all of them
    second_text=SecondText(in_rows=always),
    blocks={
        "HunyuanVideoTransformerBlock": (IMAGE, TEXT),
        "HunyuanVideoSingleTransformerBlock": (IMAGE, TEXT),
    },
)
