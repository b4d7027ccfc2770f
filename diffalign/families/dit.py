"""DiT: class labels instead of text, a learned variance, both branches in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.families.family import IMAGE, Family, entries
from diffalign.families.text import SELF

if TYPE_CHECKING:
    from torch import Tensor


def every_row(guided: Tensor, arrival: Tensor) -> Tensor:
    """The scheduler gets every row that ran, both halves under guidance, without the variance."""
    import torch

    both = guided if guided.shape[0] == arrival.shape[0] else torch.cat([guided, guided])
    return both[:, : arrival.shape[1]]


DIT = Family(
    "dit",
    pipelines=("DiTPipeline",),
    order="cu",
    to_step=every_row,
    text=(),
    self_attention=SELF,
    blocks={"BasicTransformerBlock": (IMAGE,)},
    defaults={
        "apg": entries(
            "Sadat et al. 2024 (arXiv:2410.02416), DiT-XL, as read in summaries of the paper",
            cap=5.0,
            momentum=-0.5,
        )
    },
)
