"""Which tokens come first: their ranks within labels, and the places of the smallest keys."""

import torch
from torch import Tensor


def check_ranks(values: Tensor, labels: Tensor) -> None:
    """Raise the errors that ``ranks`` documents."""
    if values.ndim != 2 or values.shape != labels.shape:
        raise ValueError(
            "selection: values and labels must both be [B, N]; got "
            f"{list(values.shape)} and {list(labels.shape)}."
        )
    if values.dtype != torch.float32 or labels.dtype != torch.int64:
        raise TypeError(
            "selection: values must be float32 and labels int64; got "
            f"{values.dtype} and {labels.dtype}."
        )


def check_smallest(keys: Tensor, count: int) -> None:
    """Raise the errors that ``smallest`` documents."""
    if keys.ndim != 2 or not 0 <= count <= keys.shape[1]:
        raise ValueError(
            "selection: keys must be [B, N] and count a number of them, 0 to N; got "
            f"{list(keys.shape)} and {count}."
        )
    if keys.dtype != torch.int64:
        raise TypeError(f"selection: keys must be int64; got {keys.dtype}.")


def ranks(values: Tensor, labels: Tensor) -> Tensor:
    """The place [B, N] of each token among those of its label, by falling ``values`` [B, N].

    Places count from 0; of equal values the first token comes first. ``labels`` [B, N]: any int64.
    Cost: two stable sorts and a binary search.

    Raises:
        ValueError: shapes that do not fit. TypeError: other dtypes.
    """
    check_ranks(values, labels)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    order = by_value.gather(1, labels.gather(1, by_value).argsort(dim=1, stable=True))
    ordered = labels.gather(1, order)
    first = torch.searchsorted(ordered, ordered)  # where the label begins
    positions = torch.arange(labels.shape[1], device=labels.device) - first
    return torch.zeros_like(order).scatter(1, order, positions)


def smallest(keys: Tensor, count: int) -> Tensor:
    """The places [B, count] of the smallest ``keys`` [B, N] of each row, rising; of equal keys the
    first.

    Cost: two sorts, one of N keys and one of ``count`` places.

    Raises:
        ValueError: ``count`` is not in [0, N], or ``keys`` have other axes. TypeError: keys that
        are not int64.
    """
    check_smallest(keys, count)
    return keys.argsort(dim=1, stable=True)[:, :count].sort(1).values
