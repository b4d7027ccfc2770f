"""PixArt-alpha and PixArt-Sigma: cross-attention to masked text, both branches in one batch."""

from __future__ import annotations

from diffalign.families.arithmetic import first_channels
from diffalign.families.family import IMAGE, Family, entries
from diffalign.families.layout import TokenPlaces
from diffalign.families.text import (
    CROSS,
    HIDDEN_MASKED,
    MASKED,
    SELF,
    TEXT_MASKED,
    Encoder,
    SecondText,
)

PIXART = Family(
    "pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    to_step=first_channels,
    text=HIDDEN_MASKED,
    encoder=Encoder(MASKED, TEXT_MASKED),
    attention=CROSS,
    self_attention=SELF,
    tokens=TokenPlaces(
        embed="pos_embed",
        out="proj_out",
        image=r"transformer_blocks\.\d+\.(attn1\.to_.*|attn2\.to_(q|out).*|ff\..*)|proj_out",
        text=r"transformer_blocks\.\d+\.attn2\.to_(k|v|kv)",
    ),
    second_text=SecondText(tokens=r"caption_projection"),
    blocks={"BasicTransformerBlock": (IMAGE,)},
    defaults={
        "nag": entries(
            "Chen et al. 2025 (arXiv:2505.21179), table 5, PixArt-Sigma (phi 4)",
            scale=5.0,
            tau=2.5,
            alpha=0.375,
        )
    },
)
