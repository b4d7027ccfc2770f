"""The choice of tokens in two Triton kernels without a sort.

A rank is the number of tokens that come before, counted pair by pair: N comparisons for each token
are nothing to a GPU. The smallest keys are those up to a limit that bisection finds in the
registers of one program for each row. Eager torch needs five sorts for the choice of a step, each a
chain of launches. What is saved is small: choosing took at most 0.03% of a pruned step on a CPU.
"""

import torch
from torch import Tensor

from diffalign.kernels.layout import row_plan
from diffalign.kernels.selection import naive

MAX_TOKENS = 8192  # the keys of a row fit the registers of 16 warps; 16,384 spill
ROWS = TILE = 64
"""Tokens of a program, and of one of its comparisons."""


def refusal(tokens: int) -> str | None:
    """None if the kernels take so many tokens, else the reason."""
    return f"{tokens} tokens are more than {MAX_TOKENS}" if tokens > MAX_TOKENS else None


def _limit(tokens: int) -> None:
    if reason := refusal(tokens):
        raise ValueError(
            f"selection: {reason}. Use diffalign.kernels.selection.choose, which falls back to "
            "torch."
        )


def ranks(values: Tensor, labels: Tensor) -> Tensor:
    """``naive.ranks`` in one launch, the same numbers; values that are no numbers come first.

    Cost: N^2 comparisons for each row.

    Raises:
        ValueError, TypeError: as ``naive.ranks``; also ValueError for more than MAX_TOKENS.
    """
    naive.check_ranks(values, labels)
    batch, tokens = values.shape
    _limit(tokens)
    out = torch.empty_like(labels, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    from diffalign.kernels.selection.program import rank_tokens

    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call, unused-ignore]
        rank_tokens[(-(-tokens // ROWS), batch)](
            *(values.detach().contiguous(), labels.contiguous(), out, tokens),
            ROWS=ROWS,
            TILE=TILE,
            num_warps=4,
        )
    return out


def smallest(keys: Tensor, count: int) -> Tensor:
    """``naive.smallest`` in one launch, the same numbers.

    Cost: one sweep over the keys, and at most 64 counts of what lies in registers.

    Raises:
        ValueError, TypeError: as ``naive.smallest``; also ValueError for more than MAX_TOKENS.
    """
    naive.check_smallest(keys, count)
    batch, tokens = keys.shape
    _limit(tokens)
    out = keys.new_empty((batch, count))
    if out.numel() == 0:
        return out
    from diffalign.kernels.selection.program import smallest_of_row

    block, warps = row_plan(tokens)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call, unused-ignore]
        smallest_of_row[(batch,)](
            *(keys.contiguous(), out, tokens, count), BLOCK=block, num_warps=warps
        )
    return out
