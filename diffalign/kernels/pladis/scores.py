"""Argument checks and attention scores shared by the torch forms of PLADIS."""

import math

import torch
from torch import Tensor

from diffalign.kernels.choice import accumulator, check_finite


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strength: float,
    alpha: float,
    mask: Tensor | None,
    base: Tensor | None,
    mass: Tensor | None,
) -> None:
    """Raise the errors that ``diffalign.kernels.pladis.PladisCall`` documents."""
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[-1] != k.shape[-1]
    ):
        raise ValueError(
            "pladis: q must be [B, A, N, D] and k, v [B, A, L, D] with the same B, A and D; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}. Repeat grouped key heads "
            "first."
        )
    if k.shape[2] == 0:
        raise ValueError("pladis: k has no keys (L = 0).")
    if (
        not q.is_floating_point()
        or len({t.dtype for t in (q, k, v)}) > 1
        or len({t.device for t in (q, k, v)}) > 1
    ):
        raise TypeError(
            f"pladis: q, k, v must share one floating dtype and device; got {q.dtype}, {k.dtype}, "
            f"{v.dtype}."
        )
    check_finite("pladis", strength=strength)
    if alpha not in (1.5, 2.0):
        raise ValueError(f"pladis: alpha must be 1.5 (entmax) or 2 (sparsemax); got {alpha!r}.")
    if mask is not None:
        check_mask(mask, (*q.shape[:3], k.shape[2]))
    if base is not None and (base.shape != q.shape or base.dtype != q.dtype):
        raise ValueError(
            f"pladis: base must look like q, {q.dtype} {list(q.shape)}; got {base.dtype} "
            f"{list(base.shape)}."
        )
    if mass is not None and (base is None or mass.shape != q.shape[:3]):
        raise ValueError(
            f"pladis: mass must be [B, A, N] = {list(q.shape[:3])} and needs base; got "
            f"{list(mass.shape)}."
        )


def check_mask(mask: Tensor, full: tuple[int, ...]) -> None:
    """Raise where ``mask`` is neither boolean nor floating point, or does not broadcast to the
    scores' shape ``full``."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            "pladis: mask must be boolean (True = use) or an additive float bias; got "
            f"{mask.dtype}."
        )
    if mask.ndim > 4 or any(m not in (1, f) for m, f in zip(reversed(mask.shape), reversed(full))):
        raise ValueError(
            f"pladis: mask must broadcast to [B, A, N, L] = {list(full)}; got {list(mask.shape)}."
        )


def split_mask(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(finite additive bias, boolean keep) of an attention mask; -inf in a float mask becomes False
    in ``keep`` and 0 in the bias."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return None, mask
    keep = mask != -math.inf
    return mask.to(dtype).masked_fill(~keep, 0), keep


def scores(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """Scaled scores [B, A, N, L] in the accumulator dtype, masks other than a finite bias not
    applied."""
    dtype = accumulator(q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    z = (q.to(dtype) * factor) @ k.to(dtype).transpose(-1, -2)
    return z if bias is None else z + bias


def softmax(z: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over the last axis with exact 0 at masked keys; a row without keys is 0."""
    if keep is None:
        return torch.softmax(z, -1)
    weights = torch.softmax(z.masked_fill(~keep, torch.finfo(z.dtype).min), -1)
    return weights.masked_fill(~keep, 0)
