"""Hunyuan-DiT: two texts in cross-attention, a learned variance, both branches in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.families.arithmetic import first_channels, rescale
from diffalign.families.family import Family, PipelineOption

if TYPE_CHECKING:
    from torch import Tensor


def half_rescale(guided: Tensor, cond: Tensor, phi: Any) -> Tensor:
    """Guidance rescale without the channels of the variance."""
    import torch

    if not phi:
        return guided
    half = guided.shape[1] // 2
    first = rescale(guided[:, :half], cond[:, :half], phi)
    return torch.cat((first, guided[:, half:]), dim=1)


HUNYUAN_DIT = Family(
    "hunyuan-dit",
    pipelines=("HunyuanDiTPipeline",),
    to_step=first_channels,
    self_attention=r"blocks\.\d+\.attn1",
    options=(PipelineOption("guidance_rescale", 0.0, post=half_rescale),),
)
