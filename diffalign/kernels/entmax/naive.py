"""Exact sparse maps by sorting: entmax-1.5 (Peters et al. 2019, arXiv:1905.05702), sparsemax
(Martins & Astudillo 2016, arXiv:1602.02068).

The slow truth of this folder: the threshold comes from the sorted scores in closed form, without
iteration.
"""

import torch
from torch import Tensor

from diffalign.kernels.entmax.scores import Solver, entmax_with, shifted


def solve(x: Tensor, alpha: float) -> Tensor:
    """Threshold ``tau`` [..., 1] with ``sum_j (x_j - tau)_+ ** (1 / (alpha - 1)) = 1`` for shifted
    scores ``x`` [..., L] (maximum 0)."""
    top = x.sort(dim=-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = top.cumsum(-1) / k
    if alpha == 2:
        candidates = mean - 1 / k
    else:  # the smaller root of k (mean - tau)^2 + spread = 1
        spread = top.square().cumsum(-1) - k * mean.square()
        candidates = mean - ((1 - spread) / k).clamp_min(0).sqrt()
    inside = candidates < top if alpha == 2 else candidates <= top
    support = inside.sum(-1, keepdim=True).clamp_min(1)
    return candidates.gather(-1, support - 1)


def entmax(z: Tensor, alpha: float = 1.5, *, mask: Tensor | None = None) -> Tensor:
    """alpha-entmax of scores ``z`` [..., L] over the last axis; arguments and errors as
    ``diffalign.kernels.entmax.entmax``.

    Cost: one sort of ``z`` in float32 (float64 for float64 input) with int64 indices.
    """
    return entmax_with(solve, z, alpha, mask)


__all__ = ["Solver", "entmax", "shifted", "solve"]
