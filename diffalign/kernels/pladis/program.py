"""The PLADIS kernel itself, as Triton compiles it. Importing this module imports Triton."""

import triton
import triton.language as tl

STRIDES = tuple(f"{t}_{axis}" for t in ("q", "k", "v", "base", "out") for axis in "ban")
RUNTIME = (*STRIDES, "bias_b", "mass_b", "mass_a", "mass_n", "N", "L")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def threshold(  # type: ignore[no-untyped-def]
    x, ROWS: tl.constexpr, STEPS: tl.constexpr, SPARSEMAX: tl.constexpr
):
    """Newton's steps from below to the threshold of each row of ``x`` [ROWS, keys], whose maximum
    is 0."""
    tau = tl.full([ROWS], -1.0, tl.float32)
    for _ in range(STEPS):
        u = tl.maximum(x - tau[:, None], 0.0)
        if SPARSEMAX:
            excess = tl.sum(u, axis=1) - 1.0
            tau += excess / tl.maximum(tl.sum((u > 0.0).to(tl.float32), axis=1), 1.0)
        else:
            tau += (tl.sum(u * u, axis=1) - 1.0) / tl.maximum(2.0 * tl.sum(u, axis=1), 1e-20)
    return tau


# not specialised on integers: one binary per configuration, the one that is compiled ahead of time
# in the tests
@triton.jit(do_not_specialize=RUNTIME)  # type: ignore[untyped-decorator, unused-ignore]
def pladis_tile(  # type: ignore[no-untyped-def]
    Q, K, V, BIAS, BASE, MASS, OUT,
    q_b, q_a, q_n, k_b, k_a, k_n, v_b, v_a, v_n, base_b, base_a, base_n, out_b, out_a, out_n,
    bias_b, mass_b, mass_a, mass_n, N, L, scale, strength,
    D: tl.constexpr, HEAD_TILE: tl.constexpr, KEY_TILE: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, SPARSEMAX: tl.constexpr, HAS_BIAS: tl.constexpr, ANCHORED: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head and batch entry against all L keys, in one tile of KEY_TILE
    columns."""
    a = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, KEY_TILE)
    d = tl.arange(0, HEAD_TILE)
    n64 = n.to(tl.int64)
    j64 = j.to(tl.int64)
    inside = (n < N)[:, None] & (d < D)[None, :]
    known = (j < L)[:, None] & (d < D)[None, :]
    rows = Q + ((b * q_b + a * q_a + n64 * q_n) * 8)[:, None]
    q = tl.load(rows + d[None, :], mask=inside, other=0.0)
    rows = K + ((b * k_b + a * k_a + j64 * k_n) * 8)[:, None]
    k = tl.load(rows + d[None, :], mask=known, other=0.0)
    z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_BIAS:
        z += tl.load(BIAS + b * bias_b + j, mask=j < L, other=0.0)[None, :]
    z = tl.where((j < L)[None, :], z, float("-inf"))
    top = tl.max(z, axis=1)
    # a row without keys stays at -inf and ends with weight 0
    x = z - tl.where(top == float("-inf"), 0.0, top)[:, None]
    if not SPARSEMAX:
        x = x * 0.5
    sparse = tl.maximum(x - threshold(x, ROWS, STEPS, SPARSEMAX)[:, None], 0.0)
    if SPARSEMAX:
        dense = tl.exp(x)
    else:
        sparse = sparse * sparse
        dense = tl.exp(2.0 * x)
    sparse_factor = strength / tl.maximum(tl.sum(sparse, axis=1), 1e-20)
    dense_factor = 1.0 / tl.maximum(tl.sum(dense, axis=1), 1e-20)
    if ANCHORED:
        mass = tl.load(MASS + b * mass_b + a * mass_a + n64 * mass_n, mask=n < N, other=0.0)
        mass = mass.to(tl.float32)
        sparse_factor *= mass
        dense_factor *= -strength * mass
    else:
        dense_factor *= 1.0 - strength
    w = sparse * sparse_factor[:, None] + dense * dense_factor[:, None]
    rows = V + ((b * v_b + a * v_a + j64 * v_n) * 8)[:, None]
    v = tl.load(rows + d[None, :], mask=known, other=0.0)
    out = tl.dot(w.to(v.dtype), v, input_precision="ieee")
    if ANCHORED:
        rows = BASE + ((b * base_b + a * base_a + n64 * base_n) * 8)[:, None]
        out += tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
    rows = OUT + ((b * out_b + a * out_a + n64 * out_n) * 8)[:, None]
    tl.store(rows + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
