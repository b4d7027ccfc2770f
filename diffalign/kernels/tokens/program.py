"""The kernel itself, as Triton compiles it. Importing this module imports Triton."""

import triton
import triton.language as tl

STRIDES = ("k_b", "k_a", "k_n", "v_b", "v_a", "v_n", "length", "tokens", "count", "text")


# not specialised on integers: one binary per configuration, the one that is compiled ahead of time
# in the tests
@triton.jit(do_not_specialize=STRIDES)  # type: ignore[untyped-decorator, unused-ignore]
def write_rows(  # type: ignore[no-untyped-def]
    K, V, KEYS, VALUES, INDEX,
    k_b, k_a, k_n, v_b, v_a, v_n, length, tokens, count, text,
    E: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TEXT_FIRST: tl.constexpr,
):  # fmt: skip
    """One token of one row, keys and values of all its heads, in words of 4 bytes: E of them, D to
    a head. Strides are in units of 4 words."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    if TEXT_FIRST:
        image = n - text
        word = n
        begin = text
    else:
        image = n
        word = n - count + tokens
        begin = 0
    is_image = (image >= 0) & (image < count)
    chosen = tl.load(INDEX + b * count + image, mask=is_image, other=0).to(tl.int64)
    place = tl.where(is_image, chosen + begin, word)
    c = tl.arange(0, BLOCK)
    keep = c < E
    head = (c // D).to(tl.int64)
    k = tl.load(K + (b * k_b + n * k_n + head * k_a) * 4 + c % D, mask=keep, other=0)
    v = tl.load(V + (b * v_b + n * v_n + head * v_a) * 4 + c % D, mask=keep, other=0)
    to = ((b * (E // D) + head) * length + place) * D + c % D
    tl.store(KEYS + to, k, mask=keep)
    tl.store(VALUES + to, v, mask=keep)
