"""What training multiplies in: bf16 where the processor has instructions for it, else fp32.

Without them a bf16 product is emulated and takes ten times as long as one in fp32.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def precision() -> torch.dtype:
    """bf16 or fp32; bf16 where torch cannot say what the processor has."""
    reader = getattr(torch.cpu, "get_capabilities", None)
    abilities = {"bf16": True} if reader is None else reader()
    fast = any(has for name, has in abilities.items() if "bf16" in name)
    return torch.bfloat16 if fast else torch.float32


def autocast() -> torch.autocast:
    """Products in ``precision()`` within the block, over weights in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision() is torch.bfloat16)
