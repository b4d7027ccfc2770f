"""Keys and values of some tokens written among those of all, row by row."""

from torch import Tensor


def check(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, index: Tensor) -> int:
    """Raise the errors that ``write`` documents; the number of text tokens."""
    if keys.ndim != 4 or k.ndim != 4 or keys.shape != values.shape or k.shape != v.shape:
        raise ValueError(
            "tokens: keys and values must both be [B, A, L + N, D], k and v both [B, A, L + S, D]; "
            f"got {[list(x.shape) for x in (keys, values, k, v)]}."
        )
    batch, heads, length, size = keys.shape
    text = k.shape[2] - index.shape[-1]
    fits = (k.shape[0], k.shape[1], k.shape[3]) == (batch, heads, size)
    if not fits or tuple(index.shape) != (batch, k.shape[2] - text) or not 0 <= text <= length:
        raise ValueError(
            "tokens: keys [B, A, L + N, D], k [B, A, L + S, D] and index [B, S] must share B, A "
            f"and D, with S <= N; got {[list(x.shape) for x in (keys, k, index)]}."
        )
    if length - text < index.shape[1]:
        raise ValueError(
            f"tokens: index names {index.shape[1]} of {length - text} image tokens; it must name "
            "at most all of them."
        )
    if len({(x.dtype, x.device) for x in (keys, values, k, v)}) > 1 or index.is_floating_point():
        raise TypeError(
            "tokens: keys, values, k and v must share one dtype and device, and index be integers; "
            f"got {[str(x.dtype) for x in (keys, values, k, v, index)]}."
        )
    return text


def write(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, index: Tensor, *, text_first: bool
) -> None:
    """Put ``k`` and ``v`` [B, A, L + S, D] into ``keys`` and ``values`` [B, A, L + N, D].

    All L text tokens stand before the image tokens where ``text_first``, else behind; the S image
    tokens of row ``b`` go to the places ``index[b]`` of its N, each at most once. Other places stay
    as they are. No gradient passes.
    Cost: reads and writes 2 B (L + S) A D numbers.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes or devices that differ.
    """
    text = check(keys, values, k, v, index)
    count, tokens = index.shape[1], keys.shape[2] - text
    for buffer, x in ((keys, k), (values, v)):
        for row, chosen in enumerate(index):
            old, new = buffer[row], x[row]
            if text_first:
                old[:, :text], old[:, text + chosen] = new[:, :text], new[:, text:]
            else:
                old[:, tokens:], old[:, chosen] = new[:, count:], new[:, :count]
