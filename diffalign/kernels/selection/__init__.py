"""Which tokens a step computes: ranks within regions, and the smallest keys. ``choose`` picks torch
or the fused kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.kernels.choice import Backend, Choice, pick, why_not_triton
from diffalign.kernels.selection.naive import ranks, smallest


class Selection(NamedTuple):
    """``naive.ranks`` and ``naive.smallest``, or what stands in for them."""

    # values [B, N] and labels [B, N] -> ranks [B, N]
    ranks: Callable[[Tensor, Tensor], Tensor]
    # keys [B, N] and a count -> places [B, count], rising
    smallest: Callable[[Tensor, int], Tensor]


PLAIN = Selection(ranks, smallest)


def choose(device: torch.device, tokens: int, *, backend: Backend = "auto") -> Choice[Selection]:
    """The functions for images of so many tokens, and the reason.

    Raises:
        ValueError: unknown ``backend``, or "triton" where the kernels cannot run.
    """
    from diffalign.kernels.selection import triton as fused

    refusal = why_not_triton(device) or fused.refusal(tokens)
    selection = Selection(fused.ranks, fused.smallest)
    return pick("selection", selection, PLAIN, refusal, f"{tokens} tokens", backend)


__all__ = ["PLAIN", "Selection", "choose", "ranks", "smallest"]
