"""PLADIS in plain torch, written as the method is defined: dense attention plus a correction (Kim &
Sim 2025, arXiv:2503.07677)."""

import torch
from torch import Tensor

from diffalign.kernels.choice import accumulator, full_precision
from diffalign.kernels.entmax import naive as exact
from diffalign.kernels.pladis.scores import check, scores, softmax, split_mask


def correction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``(entmax(z) - softmax(z)) v`` [B, A, N, D] for scores ``z = scale q k^T + mask``, in float32
    (float64 for float64)."""
    with full_precision(q.device):
        bias, keep = split_mask(mask, accumulator(q.dtype))
        z = scores(q, k, scale, bias)
        return (exact.entmax(z, alpha, mask=keep) - softmax(z, keep)) @ v.to(z.dtype)


def pladis(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strength: float,
    alpha: float = 1.5,
    mask: Tensor | None = None,
    scale: float | None = None,
    base: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """The anchored form ``base + strength * mass * (entmax - softmax) v``; contract of
    ``diffalign.kernels.pladis.PladisCall``.

    Without ``base`` the dense attention is computed here. Cost: about ten float32 tensors [B, A, N,
    L] and a sort.
    """
    check(q, k, v, strength=strength, alpha=alpha, mask=mask, base=base, mass=mass)
    if base is None:
        with full_precision(q.device):
            bias, keep = split_mask(mask, accumulator(q.dtype))
            z = scores(q, k, scale, bias)
            dense = softmax(z, keep) @ v.to(z.dtype)
    else:
        dense = base
    if strength == 0:
        return dense.to(q.dtype)
    moved = correction(q, k, v, alpha=alpha, mask=mask, scale=scale)
    if mass is not None:
        moved = moved * mass.to(moved.dtype).unsqueeze(-1)
    return (dense.to(moved.dtype) + strength * moved).to(q.dtype)


def joint_weights(z: Tensor, text: slice, image: slice, *, strength: float, alpha: float) -> Tensor:
    """The whole map [B, A, S, S] of joint attention from its scores ``z``: image rows re-weigh
    their text columns, all else is softmax.

    Row by row, ``w[text] = m ((1 - strength) softmax(z[text]) + strength entmax(z[text]))`` with
    the mass ``m`` that the dense row puts on text, so rows still sum to 1. The pattern is taken
    from third-party ports of the authors' Flux code, not from the paper.
    """
    weights = torch.softmax(z, -1)
    rows = z[..., image, text]
    mass = weights[..., image, text].sum(-1, keepdim=True)
    blend = (1 - strength) * torch.softmax(rows, -1) + strength * exact.entmax(rows, alpha)
    weights = weights.clone()
    weights[..., image, text] = mass * blend
    return weights
