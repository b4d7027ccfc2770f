"""Sana: linear self-attention, cross-attention to masked text, both branches in one batch."""

from __future__ import annotations

from typing import Any

from diffalign.families.arithmetic import first_channels, upcast_mix
from diffalign.families.family import IMAGE, Family, entries
from diffalign.families.text import CROSS, HIDDEN_MASKED, MASKED, TEXT_MASKED, Encoder, SecondText


def time(value: float, pipe: Any) -> float:
    return value / float(pipe.transformer.config.timestep_scale)


SANA = Family(
    "sana",
    pipelines=("SanaPipeline", "SanaControlNetPipeline"),
    mix=upcast_mix,
    to_step=first_channels,
    time=time,
    text=HIDDEN_MASKED,
    encoder=Encoder(MASKED, TEXT_MASKED),
    attention=CROSS,
    second_text=SecondText(tokens=r"caption_projection"),
    blocks={"SanaTransformerBlock": (IMAGE,)},
    refusals={
        **dict.fromkeys(
            ("pag", "seg"),
            "its self-attention is linear and has no map that could be changed. Use S2Guidance.",
        ),
        "cat": "its feed-forward layers are convolutions, which need every position.",
    },
    defaults={
        "nag": entries(
            "Chen et al. 2025 (arXiv:2505.21179), table 5, SANA (phi 4)",
            scale=5.0,
            tau=2.5,
            alpha=0.375,
        )
    },
)
