"""Cosmos 2: cross-attention to the text, two calls, each prediction mapped to x0 before mixing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.families.family import IMAGE, Family
from diffalign.families.text import CROSS, SELF, Encoder, SecondText

if TYPE_CHECKING:
    from torch import Tensor


def mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``cond + s * (cond - uncond)`` with s = scale - 1."""
    return cond + (scale - 1.0) * (cond - uncond)


def time(value: float, pipe: Any) -> float:
    return 1000.0 * value / max(1.0 - value, 1e-6)


COSMOS2 = Family(
    "cosmos2",
    live_scale=True,
    pipelines=("Cosmos2TextToImagePipeline",),
    mode="sequential",
    affine=True,
    offset=1.0,
    mix=mix,
    parametrisation="flow",
    sigma=lambda value: value / (1.0 + value),
    time=time,
    encoder=Encoder(),
    attention=CROSS,
    self_attention=SELF,
    second_text=SecondText(),
    blocks={"CosmosTransformerBlock": (IMAGE,)},
    refusals={
        "cfg-plus-plus": (
            "the pipeline repeats its last noise level, and CFGPlusPlus needs falling ones. Use "
            "CFG."
        )
    },
)
