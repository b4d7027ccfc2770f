"""Memory layout that the Triton kernels need: rows that can be read in 16-byte pieces."""

from torch import Tensor

# kernels take strides in units of 8 elements, so that 16-byte loads are provable whatever the shape
UNIT = 8


def aligned(t: Tensor) -> Tensor:
    """``t`` itself if its rows are dense and start on 16-byte boundaries, else a dense copy."""
    dense = (
        t.stride(-1) == 1
        and t.storage_offset() % UNIT == 0
        and all(s % UNIT == 0 for s in t.stride()[:-1])
    )
    return t if dense else t.contiguous()
