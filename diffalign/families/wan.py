"""Wan 2.1 and 2.2 video: cross-attention to the text, two calls, one or two experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffalign.families.family import IMAGE, Family, entries
from diffalign.families.text import Encoder, SecondText, TextLayers


def reads_an_image(denoiser: Any) -> bool:
    """Wan 2.1 image-to-video splits its context at 512 text tokens."""
    return denoiser.config.get("added_kv_proj_dim") is not None


WAN = Family(
    "wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    modular=("WanModularPipeline", "Wan22ModularPipeline"),
    denoisers=("transformer", "transformer_2"),
    gates=("guidance_scale", "guidance_scale_2"),
    mode="sequential",
    encoder=Encoder(),
    attention=TextLayers(r"(vace_)?blocks\.\d+\.attn2", "cross"),
    self_attention=r"blocks\.\d+\.attn1",
    second_text=SecondText(in_rows=reads_an_image),
    blocks={"WanTransformerBlock": (IMAGE,)},
    defaults={
        "nag": entries(
            "Chen et al. 2025 (arXiv:2505.21179), table 5, Wan 2.1 (phi 4); the authors' README "
            "uses scale 9",
            scale=5.0,
            tau=2.5,
            alpha=0.25,
        )
    },
)
VIDEO_TO_VIDEO = replace(
    WAN,
    pipelines=("WanVideoToVideoPipeline",),
    modular=(),
    denoisers=("transformer",),
    gates=("guidance_scale",),
)
