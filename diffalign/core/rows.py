"""What every state that travels with images can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Values = Sequence[Any]
"""The same part of several states, of any kind."""


@runtime_checkable
class Rows(Protocol):
    """State of a batch of images: copied and reordered when a search drops or multiplies images."""

    def select(self, rows: Sequence[int]) -> Self:
        """The state of those images, in that order; an image may appear more than once."""
        ...


@runtime_checkable
class Joinable(Protocol):
    """A state that knows by itself how several become one."""

    def join(self, others: Sequence[Self], sizes: Sequence[int]) -> Self:
        """One state of all images, its own first. ``sizes``: images of each, its own first."""
        ...


R = TypeVar("R", bound=Rows)


def select_rows(state: R | None, rows: Sequence[int]) -> R | None:
    """``state.select(rows)``; None, the state of a technique that remembers nothing, stays None."""
    return None if state is None else state.select(rows)


def join_rows(states: Sequence[R | None], sizes: Sequence[int]) -> R | None:
    """One state of all images, in order; ``sizes``: the images of each state.

    A state says by its own ``select`` which axis of a tensor and which tuple holds its images:
    those are put together. What does not depend on the images must be equal and is kept.
    Raises: ValueError where the states cannot be joined.
    """
    first = states[0]
    if isinstance(first, Joinable) and all(type(state) is type(first) for state in states):
        joined: R = first.join(states[1:], sizes)
        return joined
    # the same states with one image more show where the images are
    longer = [
        None if state is None else state.select([0] * (size + 1))
        for state, size in zip(states, sizes)
    ]
    result: Any = join_values(states, longer, sizes, type(first).__name__)
    return result  # type: ignore[no-any-return]


def join_values(values: Values, longer: Values, sizes: Sequence[int], where: str) -> object:
    """``join_rows`` for a part of a state; ``longer``: the part for one image more of each.

    ``where`` is the part's name, for errors.
    """
    import torch

    first, probe = values[0], longer[0]
    if any(type(value) is not type(first) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise ValueError(f"join: {where} differs between the states ({kinds}).")
    if isinstance(first, torch.Tensor):
        return _join_tensors(values, longer, sizes, where)
    if is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in fields(first) if f.init]
        parts = {n: _joined_part(values, longer, sizes, n, where) for n in names}
        return type(first)(**parts)
    if isinstance(first, Mapping):
        keys = list(first)
        if any(set(value) != set(keys) for value in values):
            raise ValueError(f"join: {where} has different entries in the states.")
        return {key: _joined_entry(values, longer, sizes, key, where) for key in keys}
    if isinstance(first, list | tuple):
        if len(first) == sizes[0] and len(probe) == sizes[0] + 1:  # an entry for each image
            return type(first)(item for value in values for item in value)
        lengths = {len(value) for value in values}
        if len(lengths) > 1:
            raise ValueError(f"join: {where} has different lengths in the states: {lengths}.")
        return type(first)(
            _joined_entry(values, longer, sizes, i, where) for i in range(len(first))
        )
    if any(value != first for value in values):
        raise ValueError(f"join: {where} differs between the states.")
    return first


def _joined_part(
    values: Values, longer: Values, sizes: Sequence[int], name: str, where: str
) -> object:
    parts, probes = ([getattr(value, name) for value in group] for group in (values, longer))
    return join_values(parts, probes, sizes, f"{where}.{name}")


def _joined_entry(
    values: Values, longer: Values, sizes: Sequence[int], key: object, where: str
) -> object:
    parts, probes = ([value[key] for value in group] for group in (values, longer))
    return join_values(parts, probes, sizes, f"{where}[{key!r}]")


def _join_tensors(
    tensors: Sequence[Tensor], longer: Sequence[Tensor], sizes: Sequence[int], where: str
) -> Tensor:
    """Tensors put together along the axis in which ``longer`` is longer, or the one they share."""
    import torch

    axes = {
        axis
        for tensor, probe in zip(tensors, longer)
        for axis in range(tensor.ndim)
        if tensor.shape[axis] != probe.shape[axis]
    }
    if len(axes) == 1:
        try:
            return torch.cat(list(tensors), axes.pop())
        except RuntimeError as error:
            raise ValueError(f"join: {where} has shapes that do not fit: {error}") from error
    if axes or any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise ValueError(f"join: {where} differs between the states and is not held by images.")
    return tensors[0]
