"""Ranks instead of scores: several rewards on one scale that none of them sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(scores: Tensor) -> Tensor:
    """Ranks [..., B], float64, of scores [..., B]: 1 for the lowest; equal scores share the mean of
    their places."""
    below = (scores[..., None, :] < scores[..., :, None]).sum(-1)
    equal = (scores[..., None, :] == scores[..., :, None]).sum(-1)
    return below.double() + (equal.double() + 1.0) / 2.0


def mixed_ranks(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """``1/|M| sum_v c_v Rank_v(i)`` [B] of scores [R, B] by R rewards with weights ``c``.

    A reward's own scale does not matter: any increasing function of its scores gives the same.
    Liu et al. 2025, arXiv:2503.18942. |M| counts rewards whose weight is not 0.
    """
    factors = torch.tensor(list(weights), dtype=torch.float64)
    count = max(int((factors != 0).sum()), 1)
    return factors @ ranks(scores) / count
