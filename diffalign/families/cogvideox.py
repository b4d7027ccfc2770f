"""CogVideoX: text of one length before the video in one attention, both branches in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.families.arithmetic import upcast_mix
from diffalign.families.family import IMAGE, TEXT, Family
from diffalign.families.layout import Grid, patches
from diffalign.families.text import Encoder, SecondText, TextLayers, always


def grid(denoiser: Any, arguments: Mapping[str, Any]) -> Grid:
    """Latents [B, T, C, H, W]."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    depth, high, wide = patches(denoiser)
    return frames // depth, height // high, width // wide


COGVIDEOX = Family(
    "cogvideox",
    live_scale=True,
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    mix=upcast_mix,
    grid=grid,
    refuses={
        "use_dynamic_cfg": "the pipeline would change the scale by itself; use da.ScheduledCFG."
    },
    encoder=Encoder(),
    attention=TextLayers(r"transformer_blocks\.\d+\.attn1", "joint"),
    second_text=SecondText(in_rows=always),
    blocks={"CogVideoXBlock": (IMAGE, TEXT)},
)
