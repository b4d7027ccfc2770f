"""PLADIS cross-attention as one Triton kernel: scores, softmax, entmax threshold, blend and a
single product with the values.

All keys of a row lie in one tile (77 keys in 128 columns), so the threshold needs only row
reductions in registers and no score ever reaches memory. Eager torch moves about 250 bytes per
score for the published form with float32 logits.
"""

from typing import Any

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.entmax.newton import iterations
from diffalign.kernels.layout import UNIT, aligned
from diffalign.kernels.pladis import eager
from diffalign.kernels.pladis.scores import check
from diffalign.kernels.pladis.tiles import Plan, plan


def kernel() -> Any:
    """The Triton function; imports Triton on the first call."""
    from diffalign.kernels.pladis.program import pladis_tile

    return pladis_tile


def key_bias(mask: Tensor | None) -> Tensor | None:
    """A key mask [B or 1, 1, 1, L] (boolean or additive) as float32 bias [B or 1, L]."""
    if mask is None:
        return None
    row = mask.reshape(mask.shape[0] if mask.ndim == 4 else 1, mask.shape[-1])
    if row.dtype == torch.bool:
        return torch.zeros(row.shape, dtype=torch.float32, device=row.device).masked_fill_(
            ~row, float("-inf")
        )
    return row.to(torch.float32).contiguous()


def is_key_mask(mask: Tensor | None, keys: int) -> bool:
    """True if ``mask`` is None or the same for all heads and queries, with one entry per key."""
    return mask is None or (mask.shape[-1] == keys and all(size == 1 for size in mask.shape[-3:-1]))


def tiles_for(size: int, keys: int) -> Plan:
    """``plan``, or the ValueError that says there is none."""
    tiles = plan(size, keys)
    if tiles is None:
        raise ValueError(
            f"pladis: no tile for head size {size} with {keys} keys. Use "
            "diffalign.kernels.pladis.choose, which falls back."
        )
    return tiles


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
    """Contract of ``diffalign.kernels.pladis.PladisCall`` in one launch.

    Where a gradient is needed or the mask varies per query, ``eager.pladis`` runs instead.
    Everything is float32 except the weights, which are rounded to the dtype of ``v`` before the
    product. The result is [B, A, N, D] over memory laid out [B, N, A, D], so that the caller's
    ``transpose(1, 2).reshape`` moves nothing. ``choose`` offers 16-bit dtypes only; float32 runs
    here too, slowly.
    Cost: reads q, k, v (and base, mass), writes the output, no score in memory; operands that are
    not dense or not aligned are copied.

    Raises:
        ValueError, TypeError: as the contract; also ValueError where ``plan`` has no tile.
    """
    check(q, k, v, strength=strength, alpha=alpha, mask=mask, base=base, mass=mass)
    if needs_grad(q, k, v, mask, base, mass) or not is_key_mask(mask, k.shape[2]):
        return eager.pladis(
            q, k, v, strength=strength, alpha=alpha, mask=mask, scale=scale, base=base, mass=mass
        )
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    tiles = tiles_for(size, keys)
    out = torch.empty((batch, queries, heads, size), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    q, k, v = aligned(q), aligned(k), aligned(v)
    bias, base = key_bias(mask), None if base is None else aligned(base)
    if base is not None and mass is None:
        mass = torch.ones((1, 1, 1), dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call, unused-ignore]
        kernel()[(-(-queries // tiles.rows), heads, batch)](
            *(q, k, v, bias, base, mass, out),
            *strides(q, k, v, base, out, bias, mass),
            *(queries, keys),
            float(size**-0.5 if scale is None else scale),
            float(strength),
            D=size,
            HEAD_TILE=tiles.head_tile,
            KEY_TILE=tiles.key_tile,
            ROWS=tiles.rows,
            STEPS=iterations(keys),
            SPARSEMAX=alpha == 2,
            HAS_BIAS=bias is not None,
            ANCHORED=base is not None,
            num_warps=tiles.warps,
            num_stages=1,
        )
    return out


def strides(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    out: Tensor,
    bias: Tensor | None,
    mass: Tensor | None,
) -> list[int]:
    """The strides that the kernel takes, in its order; 0 where a tensor is missing or the same for
    all rows."""
    rows = [(0, 0, 0) if t is None else t.stride()[:3] for t in (q, k, v, base, out)]
    of_bias = 0 if bias is None or bias.shape[0] == 1 else bias.stride(0)
    of_mass = (0, 0, 0) if mass is None or mass.numel() == 1 else mass.stride()
    return [*(stride // UNIT for row in rows for stride in row), of_bias, *of_mass]
