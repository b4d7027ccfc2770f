"""Memory layout that the Triton kernels need: rows that can be read in 16-byte pieces."""

from torch import Tensor

# kernels take strides in units of 8 elements, so that 16-byte loads are provable whatever the shape
UNIT = 8


def row_plan(elements: int) -> tuple[int, int]:
    """(padded width, warps) of a program that holds one row of ``elements``: 8 of them, one 16-byte
    load of 16 bits, per thread where that is possible."""
    block = max(256, 1 << (elements - 1).bit_length())
    return block, min(16, block // 256)


def aligned(t: Tensor) -> Tensor:
    """``t`` itself if its rows are dense and start on 16-byte boundaries, else a dense copy."""
    dense = (
        t.stride(-1) == 1
        and t.storage_offset() % UNIT == 0
        and all(s % UNIT == 0 for s in t.stride()[:-1])
    )
    return t if dense else t.contiguous()
