"""The NAG epilogue as one Triton kernel: each input is read once, the output written once, 6 bytes
per element in 16 bits.

One program holds one token's row of ``z_pos`` and ``z_neg`` in registers as float32, so both norms
and the blend need no second read. Eager torch moves about 50 bytes per element for the published
chain of operations.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.layout import UNIT, aligned
from diffalign.kernels.nag import naive

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401  (for the annotations; the kernel itself imports it when it is built)

MAX_CHANNELS = 8192  # two float32 rows of this width still fit the registers of 16 warps


def plan(channels: int) -> tuple[int, int]:
    """(padded row width, warps) for rows of ``channels`` elements: 8 elements, one 16-byte load,
    per thread where that is possible."""
    block = max(256, 1 << (channels - 1).bit_length())
    return block, min(16, block // 256)


def refusal(dtype: torch.dtype, channels: int) -> str | None:
    """None if the kernel takes rows of ``channels`` elements of ``dtype``, else the reason."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not a dtype of the kernel"
    if channels % UNIT or channels > MAX_CHANNELS:
        return f"{channels} channels are not a multiple of {UNIT} up to {MAX_CHANNELS}"
    return None


@cache
def kernel() -> Any:
    """The Triton function; imports Triton on the first call."""
    global tl
    import triton
    import triton.language as tl

    strides = ["pos_b", "pos_n", "neg_b", "neg_n", "out_b", "out_n"]

    # not specialised on integers: one binary per configuration, the one that is compiled ahead of
    # time in the tests
    @triton.jit(do_not_specialize=strides)  # type: ignore[untyped-decorator, unused-ignore]
    def nag_rows(  # type: ignore[no-untyped-def]
        POS,
        NEG,
        OUT,
        pos_b,
        pos_n,
        neg_b,
        neg_n,
        out_b,
        out_n,
        scale,
        tau,
        alpha,
        E: tl.constexpr,
        BLOCK: tl.constexpr,
        L1: tl.constexpr,
    ):
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

    return nag_rows


def nag(
    z_pos: Tensor, z_neg: Tensor, *, scale: float, tau: float, alpha: float, norm: naive.Norm = "l1"
) -> Tensor:
    """``naive.nag`` in one launch; where autograd needs a gradient, ``naive.nag`` itself.

    Cost: 3 tensor sweeps, no temporary; an input whose rows are not dense or not 16-byte aligned is
    copied first.

    Raises:
        ValueError, TypeError: as ``naive.nag``; also ValueError for a dtype or width outside
        ``refusal``.
    """
    naive.check(z_pos, z_neg, scale, tau, alpha, norm)
    if scale == 1 or alpha == 0:
        return z_pos
    if needs_grad(z_pos, z_neg):
        return naive.nag(z_pos, z_neg, scale=scale, tau=tau, alpha=alpha, norm=norm)
    batch, tokens, channels = z_pos.shape
    if reason := refusal(z_pos.dtype, channels):
        raise ValueError(
            f"nag: {reason}. Use diffalign.kernels.nag.choose, which falls back to torch."
        )
    pos, neg = aligned(z_pos), aligned(z_neg)
    out = torch.empty((batch, tokens, channels), dtype=pos.dtype, device=pos.device)
    if out.numel() == 0:
        return out
    block, warps = plan(channels)
    units = [t.stride(i) // UNIT for t in (pos, neg, out) for i in (0, 1)]
    with torch.cuda.device_of(pos):  # type: ignore[no-untyped-call, unused-ignore]
        kernel()[(tokens, batch)](
            pos,
            neg,
            out,
            *units,
            float(scale),
            float(tau),
            float(alpha),
            E=channels,
            BLOCK=block,
            L1=norm == "l1",
            num_warps=warps,
        )
    return out
