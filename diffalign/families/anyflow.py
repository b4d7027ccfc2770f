"""AnyFlow-FAR video: a flow map, chunk after chunk, both branches in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.families.family import IMAGE, Family
from diffalign.families.text import Encoder, SecondText, TextLayers


def remembers(arguments: Mapping[str, Any]) -> bool:
    """A call that writes keys and values of finished chunks, and predicts nothing."""
    flags = arguments.get("kv_cache_flag")
    return bool(flags and flags["is_cache_step"])


ANYFLOW_FAR = Family(
    "anyflow-far",
    pipelines=("AnyFlowFARPipeline",),
    # the network predicts the mean velocity from a step to the next, which the rules of velocities
    # and their x0 are applied to
    parametrisation="flow",
    remembers=remembers,
    axes={"kv_cache": 1},
    only_guided=("negative_prompt_embeds",),
    encoder=Encoder(),
    attention=TextLayers(r"blocks\.\d+\.attn2", "cross"),
    second_text=SecondText(),
    blocks={"AnyFlowTransformerBlock": (IMAGE,)},
    refusals={
        "pag": "its image tokens attend through flex attention, which diffalign does not follow.",
        "seg": "its image tokens attend through flex attention, which diffalign does not follow.",
    },
)
