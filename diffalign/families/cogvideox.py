"""CogVideoX: text of one length before the video in one attention, both branches in one batch."""

from __future__ import annotations

from diffalign.families.arithmetic import upcast_mix
from diffalign.families.family import IMAGE, TEXT, Family
from diffalign.families.text import Encoder, SecondText, TextLayers, always

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
    refuses={
        "use_dynamic_cfg": "the pipeline would change the scale by itself; use da.ScheduledCFG."
    },
    encoder=Encoder(),
    attention=TextLayers(r"transformer_blocks\.\d+\.attn1", "joint"),
    second_text=SecondText(in_rows=always),
    blocks={"CogVideoXBlock": (IMAGE, TEXT)},
)
