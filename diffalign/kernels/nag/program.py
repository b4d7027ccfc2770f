"""The NAG kernel itself, as Triton compiles it. Importing this module imports Triton."""

import triton
import triton.language as tl

STRIDES = ("pos_b", "pos_n", "neg_b", "neg_n", "out_b", "out_n")


# not specialised on integers: one binary per configuration, the one that is compiled ahead of time
# in the tests
@triton.jit(do_not_specialize=STRIDES)  # type: ignore[untyped-decorator, unused-ignore]
def nag_rows(  # type: ignore[no-untyped-def]
    POS, NEG, OUT, pos_b, pos_n, neg_b, neg_n, out_b, out_n, scale, tau, alpha,
    E: tl.constexpr, BLOCK: tl.constexpr, L1: tl.constexpr,
):  # fmt: skip
    """One token of one batch entry, all its E channels."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    keep = c < E
    pos = tl.load(POS + (b * pos_b + n * pos_n) * 8 + c, mask=keep, other=0.0).to(tl.float32)
    neg = tl.load(NEG + (b * neg_b + n * neg_n) * 8 + c, mask=keep, other=0.0).to(tl.float32)
    away = pos - neg
    guided = pos + (scale - 1.0) * away
    if L1:
        size = tl.sum(tl.abs(pos), axis=0)
        grown = tl.sum(tl.abs(guided), axis=0)
    else:
        size = tl.sqrt(tl.sum(pos * pos, axis=0))
        grown = tl.sqrt(tl.sum(guided * guided, axis=0))
    r = tl.minimum(tau * size / tl.maximum(grown, 1.1754943508222875e-38), 1.0)
    out = (1.0 - alpha * (1.0 - r)) * pos + alpha * r * (scale - 1.0) * away
    tl.store(OUT + (b * out_b + n * out_n) * 8 + c, out.to(OUT.dtype.element_ty), mask=keep)
