"""The epilogue of normalised attention guidance in plain torch (Chen et al.

2025, arXiv:2505.21179, eq. 7-10).
"""

from typing import Literal

import torch
from torch import Tensor

from diffalign.kernels.choice import accumulator, check_finite

Norm = Literal["l1", "l2"]


def check(z_pos: Tensor, z_neg: Tensor, scale: float, tau: float, alpha: float, norm: str) -> None:
    """Raise the errors that ``nag`` documents."""
    if z_pos.ndim != 3 or z_pos.shape != z_neg.shape:
        raise ValueError(
            f"nag: z_pos and z_neg must both be [B, N, E]; got {list(z_pos.shape)} and "
            f"{list(z_neg.shape)}."
        )
    if not z_pos.is_floating_point() or z_pos.dtype != z_neg.dtype or z_pos.device != z_neg.device:
        raise TypeError(
            "nag: z_pos and z_neg must share one floating dtype and device; "
            f"got {z_pos.dtype} on {z_pos.device} and {z_neg.dtype} on {z_neg.device}."
        )
    check_finite("nag", scale=scale, tau=tau, alpha=alpha)
    if tau < 1:
        raise ValueError(
            f"nag: tau must be >= 1, else scale 1 would not be the identity; got {tau}."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"nag: alpha must lie in [0, 1]; got {alpha}.")
    if norm not in ("l1", "l2"):
        raise ValueError(
            f"nag: norm must be 'l1' (paper) or 'l2' (authors' Flux code); got {norm!r}."
        )


def nag(
    z_pos: Tensor, z_neg: Tensor, *, scale: float, tau: float, alpha: float, norm: Norm = "l1"
) -> Tensor:
    """Attention outputs [B, N, E] of the positive text pushed away from those of the negative text,
    growth limited per token.

    With ``g = z_pos + (scale - 1)(z_pos - z_neg)`` and ``r = min(1, tau |z_pos| / |g|)`` the result
    is ``alpha r g + (1 - alpha) z_pos``, in the form ``(1 - alpha (1 - r)) z_pos + alpha r (scale -
    1)(z_pos - z_neg)``: no division by a small norm, bit-exact where ``z_pos == z_neg`` (unless a
    norm underflows), and 0 where ``z_pos`` is a zero row. One norm per token over all ``E``
    channels. ``scale`` 1 is off (the paper's phi is ``scale - 1``), ``tau`` >= 1 limits the growth,
    ``alpha`` in [0, 1] blends. Computes in float32 (float64 for float64) and returns the dtype of
    ``z_pos``. Differentiable; the clip passes no gradient at a kink.
    Cost: two norms and four elementwise sweeps; at its peak four float32 tensors of the size of
    ``z_pos``, the result among them.

    Raises:
        ValueError: shapes that differ or are not [B, N, E], ``tau`` < 1, ``alpha`` outside [0, 1],
        another ``norm``. TypeError: dtypes or devices that differ.
    """
    check(z_pos, z_neg, scale, tau, alpha, norm)
    if scale == 1 or alpha == 0:
        return z_pos
    dtype = accumulator(z_pos.dtype)
    pos = z_pos.to(dtype)
    away = pos - z_neg.to(dtype)
    guided = torch.add(pos, away, alpha=scale - 1)
    order = 1 if norm == "l1" else 2
    size = torch.linalg.vector_norm(pos, order, dim=-1, keepdim=True)
    grown = torch.linalg.vector_norm(guided, order, dim=-1, keepdim=True)
    r = (tau * size / grown.clamp_min(torch.finfo(dtype).tiny)).clamp_max(1)
    return torch.addcmul(pos * (1 - alpha * (1 - r)), away, alpha * (scale - 1) * r).to(z_pos.dtype)
