"""The NAG epilogue as one Triton kernel: each input is read once, the output written once, 6 bytes
per element in 16 bits.

One program holds one token's row of ``z_pos`` and ``z_neg`` in registers as float32, so both norms
and the blend need no second read. Eager torch moves about 50 bytes per element for the published
chain of operations.
"""

from typing import Any

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.layout import UNIT, aligned
from diffalign.kernels.layout import row_plan as plan
from diffalign.kernels.nag import naive

MAX_CHANNELS = 8192  # two float32 rows of this width still fit the registers of 16 warps


def refusal(dtype: torch.dtype, channels: int) -> str | None:
    """None if the kernel takes rows of ``channels`` elements of ``dtype``, else the reason."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not a dtype of the kernel"
    if channels % UNIT or channels > MAX_CHANNELS:
        return f"{channels} channels are not a multiple of {UNIT} up to {MAX_CHANNELS}"
    return None


def kernel() -> Any:
    """The Triton function; imports Triton on the first call."""
    from diffalign.kernels.nag.program import nag_rows

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
