"""Lumina 2: unpadded text before the image in one attention, two calls, time runs to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.core.attention import Parts
from diffalign.families.arithmetic import backwards, negated, renorm
from diffalign.families.family import IMAGE, Family, PipelineOption
from diffalign.families.text import (
    HIDDEN_MASKED,
    MASKED,
    TEXT_MASKED,
    Encoder,
    SecondText,
    TextLayers,
    always,
)


def row_parts(denoiser: Any, call: Mapping[str, Any]) -> tuple[Parts, ...]:
    """Each row's text is as long as its mask says, and its image follows at once."""
    height, width = call["hidden_states"].shape[-2:]
    patch = int(denoiser.config.patch_size)
    image = (height // patch) * (width // patch)
    return tuple(
        {"prompt": slice(0, length), "image": slice(length, length + image)}
        for length in call["encoder_attention_mask"].sum(1).tolist()
    )


LUMINA2 = Family(
    "lumina2",
    pipelines=("Lumina2Pipeline",),
    mode="sequential",
    to_step=negated,
    target_sign=-1,
    time=backwards,
    options=(
        PipelineOption("cfg_normalization", False, post=renorm),
        PipelineOption(
            "cfg_trunc_ratio",
            1.0,
            stops=lambda ratio, index, count, time: (index + 1) / count > ratio,
        ),
    ),
    text=HIDDEN_MASKED,
    encoder=Encoder(MASKED, TEXT_MASKED),
    attention=TextLayers(r"layers\.\d+\.attn", "joint", row_parts=row_parts),
    second_text=SecondText(in_rows=always),
    # its refiners prepare one stream for the others and are not listed
    blocks={"Lumina2TransformerBlock": (IMAGE,)},
)
