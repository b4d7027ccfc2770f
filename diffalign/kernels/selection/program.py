"""The kernels themselves, as Triton compiles them. Importing this module imports Triton."""

import triton
import triton.language as tl


# not specialised on integers: one binary per configuration, the one that is compiled ahead of time
# in the tests
@triton.jit(do_not_specialize=("tokens",))  # type: ignore[untyped-decorator, unused-ignore]
def rank_tokens(  # type: ignore[no-untyped-def]
    VALUES, LABELS, OUT, tokens, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Ranks of ROWS tokens of one image: how many of the same label come before each."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1).to(tl.int64) * tokens
    here = n < tokens
    value = tl.load(VALUES + begin + n, mask=here, other=0.0)[:, None]
    label = tl.load(LABELS + begin + n, mask=here, other=0)[:, None]
    rank = tl.zeros((ROWS,), tl.int32)
    for start in range(0, tokens, TILE):
        m = start + tl.arange(0, TILE)
        there = m < tokens
        others = tl.load(VALUES + begin + m, mask=there, other=0.0)[None, :]
        kinds = tl.load(LABELS + begin + m, mask=there, other=0)[None, :]
        ahead = (others > value) | ((others == value) & (m[None, :] < n[:, None]))
        rank += tl.sum((ahead & (kinds == label) & there[None, :]).to(tl.int32), 1)
    tl.store(OUT + begin + n, rank.to(tl.int64), mask=here)


@triton.jit(do_not_specialize=("tokens", "count"))  # type: ignore[untyped-decorator, unused-ignore]
def smallest_of_row(  # type: ignore[no-untyped-def]
    KEYS, OUT, tokens, count, BLOCK: tl.constexpr
):
    """The places of one row's smallest keys: the largest of these keys by bisection, then a sweep
    that writes their places in turn."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    here = n < tokens
    # a key of the row in the places behind it, which changes neither limit
    key = tl.load(KEYS + b * tokens + n, mask=here, other=tl.load(KEYS + b * tokens))
    low, high = tl.min(key, 0), tl.max(key, 0)
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # no overflow
        enough = tl.sum((here & (key <= middle)).to(tl.int32), 0) >= count
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    below, equal = here & (key < low), here & (key == low)
    room = count - tl.sum(below.to(tl.int32), 0)
    hits = below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(hits.to(tl.int32), 0) - 1
    tl.store(OUT + b * count + place, n.to(tl.int64), mask=hits)
