"""Keys and values of a call written into their places by one Triton kernel: each number is read
once and written once.

Eager torch needs two indexed copies and two copies of the text. Words of 4 bytes are moved, so one
binary serves all dtypes.
"""

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.layout import UNIT, aligned, row_plan
from diffalign.kernels.tokens import naive

MAX_WORDS = 8192  # two rows of this width fit the registers of 16 warps
WORD = 4


def words(dtype: torch.dtype, heads: int, size: int) -> tuple[int, int]:
    """Words of 4 bytes in all heads, and in one."""
    each = size * dtype.itemsize // WORD
    return heads * each, each


def refusal(dtype: torch.dtype, heads: int, size: int) -> str | None:
    """None if the kernel takes heads of this size, else the reason."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not a dtype of the kernel"
    if size % UNIT:
        return f"head size {size} is not a multiple of {UNIT}"
    if words(dtype, heads, size)[0] > MAX_WORDS:
        return f"{heads} heads of size {size} are more than {MAX_WORDS} words of {WORD} bytes"
    return None


def write(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, index: Tensor, *, text_first: bool
) -> None:
    """``naive.write`` in one launch, the same bits.

    ``keys`` and ``values`` must be contiguous, since they are written in place.
    Cost: one sweep over ``k`` and ``v``; they are copied first where they are not dense or not
    16-byte aligned.

    Raises:
        ValueError, TypeError: as ``naive.write``; also ValueError for a size or dtype outside
        ``refusal``, buffers that are not contiguous, and where a gradient is needed.
    """
    text = naive.check(keys, values, k, v, index)
    batch, heads, length, size = keys.shape
    if reason := refusal(keys.dtype, heads, size):
        raise ValueError(
            f"tokens: {reason}. Use diffalign.kernels.tokens.choose, which falls back to torch."
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("tokens: keys and values are written in place and must be contiguous.")
    if needs_grad(keys, values, k, v):
        raise ValueError("tokens: no gradient passes through what is written in place.")
    if k.numel() == 0:
        return
    from diffalign.kernels.tokens.program import write_rows

    whole, each = words(keys.dtype, heads, size)
    block, warps = row_plan(whole)
    k, v = (aligned(x).view(torch.int32) for x in (k, v))
    units = [x.stride(i) // WORD for x in (k, v) for i in (0, 1, 2)]
    count = index.shape[1]
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call, unused-ignore]
        write_rows[(text + count, batch)](
            *(k, v, keys.view(torch.int32), values.view(torch.int32), index.contiguous().long()),
            *(*units, length, length - text, count, text),
            E=whole,
            D=each,
            BLOCK=block,
            TEXT_FIRST=text_first,
            num_warps=warps,
        )
