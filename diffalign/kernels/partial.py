"""Attention over parts of a key sequence, joined by the log-sum-exps of their scores.

Two texts that share one image stream share the image's attention to itself: it is computed once and
joined with each text's own part, instead of twice as a part of two whole sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.kernels.choice import accumulator, needs_grad


class Part(NamedTuple):
    """Attention of all queries over some of the keys."""

    # [B, A, N, D]
    output: Tensor
    # log-sum-exp of the scores [B, A, N], in float32 (float64 for float64)
    lse: Tensor


def attend_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Part | None:
    """Dense attention of ``q`` [B, A, N, D] over ``k``, ``v`` [B, A, L, D], None where torch has no
    fused kernel that tells the log-sum-exp.

    There is none where gradients are needed, under autocast, beside CPU and CUDA, and on CUDA in
    float32 or for head sizes that are not a multiple of 8 up to 256.
    """
    kind = q.device.type
    alike = q.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype
    if kind not in ("cpu", "cuda", "meta") or not alike or 0 in (*q.shape, *k.shape):
        return None
    # autocast would change dtypes; whoever has switched torch's fused kernels off wants none
    fused: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    if needs_grad(q, k, v) or casts or not fused:
        return None
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if kind == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return Part(*cpu(q, k, v, scale=scale)[:2])
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    if kind == "meta" or _has_flash(q, k, v):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return Part(*flash(q, k, v, scale=scale)[:2])
    return None


def join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the keys of both parts [B, A, N, D], in the dtype of their outputs.

    A part is (output, log-sum-exp of its scores); its weight is the exponential of the latter.
    """
    (one, lse), (other, other_lse) = first, second
    dtype = accumulator(one.dtype)
    weight = torch.sigmoid((lse - other_lse).to(dtype)).unsqueeze(-1)
    return torch.lerp(other.to(dtype), one.to(dtype), weight).to(one.dtype)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's flash kernel takes these CUDA tensors and is not switched off."""
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(parameters)
