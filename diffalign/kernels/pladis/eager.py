"""PLADIS in torch without a sort: one blended map and one product with the values. Differentiable,
runs everywhere."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffalign.kernels.choice import accumulator, full_precision
from diffalign.kernels.entmax import entmax
from diffalign.kernels.pladis.scores import check, scores, softmax, split_mask

CPU_SCORES = (
    1 << 18
    # 1 MB of float32 scores stay in cache between the Newton sweeps: 2 to 3 times faster than a
    # whole map at once
)
GPU_SCORES = 1 << 26  # 256 MB, a bound on memory; launches dominate below it


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
    """Contract of ``diffalign.kernels.pladis.PladisCall``.

    Cost: two matrix products, a softmax and eight Newton sweeps over float32 scores [B, A, N, L],
    tile by tile of at most ``CPU_SCORES`` or ``GPU_SCORES`` of them where no graph is being
    compiled.
    """
    check(q, k, v, strength=strength, alpha=alpha, mask=mask, base=base, mass=mass)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if q.numel() == 0:
        return torch.zeros_like(q)
    whole = [q, k, v, mask, base, mass]
    tiles = list(_tiles(q, k.shape[2]))
    if len(tiles) == 1:
        return _tile(whole, strength, alpha, scale)
    rows = []
    for b, n in tiles:
        cut = [_cut(t, 0, b) for t in whole]
        rows.append(
            _tile(
                [_cut(cut[0], 2, n), cut[1], cut[2], *(_cut(t, 2, n) for t in cut[3:])],
                strength,
                alpha,
                scale,
            )
        )
    per_batch = len([1 for b, _ in tiles if b == tiles[0][0]])
    return torch.cat(
        [torch.cat(rows[i : i + per_batch], 2) for i in range(0, len(rows), per_batch)], 0
    )


def _tile(
    operands: list[Tensor | None], strength: float, alpha: float, scale: float | None
) -> Tensor:
    q, k, v, mask, base, mass = operands
    assert q is not None
    assert k is not None
    assert v is not None
    with full_precision(q.device):
        bias, keep = split_mask(mask, accumulator(q.dtype))
        z = scores(q, k, scale, bias)
        dense, sparse = softmax(z, keep), entmax(z, alpha, mask=keep)
        values = v.to(z.dtype)
        if base is None:
            return (torch.lerp(dense, sparse, strength) @ values).to(q.dtype)
        moved = (sparse - dense) @ values * strength
    return (
        base.to(z.dtype) + (moved if mass is None else moved * mass.to(z.dtype).unsqueeze(-1))
    ).to(q.dtype)


def _tiles(q: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch, and of the queries within, that keep one tile's scores under the limit;
    everything at once under a compiler."""
    batch, heads, queries, _ = q.shape
    limit = CPU_SCORES if q.device.type == "cpu" else GPU_SCORES
    if torch.compiler.is_compiling():
        limit = batch * heads * queries * keys
    rows = max(1, limit // (heads * keys))
    per_batch = max(1, rows // queries)
    per_query = min(queries, max(16, rows)) if per_batch == 1 else queries
    for b in range(0, batch, per_batch):
        for n in range(0, queries, per_query):
            yield slice(b, b + per_batch), slice(n, n + per_query)


def _cut(t: Tensor | None, axis: int, part: slice) -> Tensor | None:
    if t is None or t.shape[axis] == 1:
        return t
    return t[(slice(None),) * axis + (part,)]
