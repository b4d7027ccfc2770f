"""PLADIS cross-attention as one Triton kernel: scores, softmax, entmax threshold, blend and a
single product with the values.

All keys of a row lie in one tile (77 keys in 128 columns), so the threshold needs only row
reductions in registers and no score ever reaches memory. Eager torch moves about 250 bytes per
score for the published form with float32 logits.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.entmax.newton import iterations
from diffalign.kernels.layout import UNIT, aligned
from diffalign.kernels.pladis import eager
from diffalign.kernels.pladis.scores import check
from diffalign.kernels.pladis.tiles import plan

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401  (for the annotations; the kernel itself imports it when it is built)


@cache
def kernel() -> Any:
    """The Triton function; imports Triton on the first call."""
    global tl
    import triton
    import triton.language as tl

    tensors = ("q", "k", "v", "base", "out")
    runtime = [f"{t}_{axis}" for t in tensors for axis in "ban"] + [
        "bias_b",
        "mass_b",
        "mass_a",
        "mass_n",
        "N",
        "L",
    ]

    # not specialised on integers: one binary per configuration, the one that is compiled ahead of
    # time in the tests
    @triton.jit(do_not_specialize=runtime)  # type: ignore[untyped-decorator, unused-ignore]
    def pladis_tile(  # type: ignore[no-untyped-def]
        Q,
        K,
        V,
        BIAS,
        BASE,
        MASS,
        OUT,
        q_b,
        q_a,
        q_n,
        k_b,
        k_a,
        k_n,
        v_b,
        v_a,
        v_n,
        base_b,
        base_a,
        base_n,
        out_b,
        out_a,
        out_n,
        bias_b,
        mass_b,
        mass_a,
        mass_n,
        N,
        L,
        scale,
        strength,
        D: tl.constexpr,
        HEAD_TILE: tl.constexpr,
        KEY_TILE: tl.constexpr,
        ROWS: tl.constexpr,
        STEPS: tl.constexpr,
        SPARSEMAX: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        ANCHORED: tl.constexpr,
    ):
        a = tl.program_id(1).to(tl.int64)
        b = tl.program_id(2).to(tl.int64)
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        j = tl.arange(0, KEY_TILE)
        d = tl.arange(0, HEAD_TILE)
        n64 = n.to(tl.int64)
        j64 = j.to(tl.int64)
        inside = (n < N)[:, None] & (d < D)[None, :]
        known = (j < L)[:, None] & (d < D)[None, :]
        q = tl.load(
            Q + ((b * q_b + a * q_a + n64 * q_n) * 8)[:, None] + d[None, :], mask=inside, other=0.0
        )
        k = tl.load(
            K + ((b * k_b + a * k_a + j64 * k_n) * 8)[:, None] + d[None, :], mask=known, other=0.0
        )
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_BIAS:
            z += tl.load(BIAS + b * bias_b + j, mask=j < L, other=0.0)[None, :]
        z = tl.where((j < L)[None, :], z, float("-inf"))
        top = tl.max(z, axis=1)
        x = (
            z - tl.where(top == float("-inf"), 0.0, top)[:, None]
        )  # a row without keys stays at -inf, ends with weight 0
        if not SPARSEMAX:
            x = x * 0.5
        tau = tl.full([ROWS], -1.0, tl.float32)
        for _ in range(STEPS):
            u = tl.maximum(x - tau[:, None], 0.0)
            if SPARSEMAX:
                tau += (tl.sum(u, axis=1) - 1.0) / tl.maximum(
                    tl.sum((u > 0.0).to(tl.float32), axis=1), 1.0
                )
            else:
                tau += (tl.sum(u * u, axis=1) - 1.0) / tl.maximum(2.0 * tl.sum(u, axis=1), 1e-20)
        sparse = tl.maximum(x - tau[:, None], 0.0)
        if SPARSEMAX:
            dense = tl.exp(x)
        else:
            sparse = sparse * sparse
            dense = tl.exp(2.0 * x)
        sparse_factor = strength / tl.maximum(tl.sum(sparse, axis=1), 1e-20)
        dense_factor = 1.0 / tl.maximum(tl.sum(dense, axis=1), 1e-20)
        if ANCHORED:
            mass = tl.load(MASS + b * mass_b + a * mass_a + n64 * mass_n, mask=n < N, other=0.0).to(
                tl.float32
            )
            sparse_factor *= mass
            dense_factor *= -strength * mass
        else:
            dense_factor *= 1.0 - strength
        w = sparse * sparse_factor[:, None] + dense * dense_factor[:, None]
        v = tl.load(
            V + ((b * v_b + a * v_a + j64 * v_n) * 8)[:, None] + d[None, :], mask=known, other=0.0
        )
        out = tl.dot(w.to(v.dtype), v, input_precision="ieee")
        if ANCHORED:
            base = BASE + ((b * base_b + a * base_a + n64 * base_n) * 8)[:, None] + d[None, :]
            out += tl.load(base, mask=inside, other=0.0).to(tl.float32)
        place = OUT + ((b * out_b + a * out_a + n64 * out_n) * 8)[:, None] + d[None, :]
        tl.store(place, out.to(OUT.dtype.element_ty), mask=inside)

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
    tiles = plan(size, keys)
    if tiles is None:
        raise ValueError(
            f"pladis: no tile for head size {size} with {keys} keys. Use "
            "diffalign.kernels.pladis.choose, which falls back."
        )
    out = torch.empty((batch, queries, heads, size), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    q, k, v = aligned(q), aligned(k), aligned(v)
    bias, base = key_bias(mask), None if base is None else aligned(base)
    units = [
        s // UNIT
        for t in (q, k, v, base, out)
        for s in ((0, 0, 0) if t is None else t.stride()[:3])
    ]
    if base is not None and mass is None:
        mass = torch.ones((1, 1, 1), dtype=q.dtype, device=q.device)
    mass_strides = (0, 0, 0) if mass is None or mass.numel() == 1 else mass.stride()
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call, unused-ignore]
        kernel()[(-(-queries // tiles.rows), heads, batch)](
            q,
            k,
            v,
            bias,
            base,
            mass,
            out,
            *units,
            0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            *mass_strides,
            queries,
            keys,
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
