"""Takes rows out of a denoiser's arguments; puts a prediction back into its container."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel

if TYPE_CHECKING:
    from diffalign.families.family import Family


def take(value: Any, rows: Sequence[int], total: int, lists: bool = False, axis: int = 0) -> Any:
    """Rows of every tensor with ``total`` on its first axis, through dictionaries, lists and
    tuples; everything else as it is.

    ``lists``: a Python list of ``total`` tensors is itself the batch. ``axis``: of tensors whose
    rows lie elsewhere, in dictionaries too.
    """
    if isinstance(value, Tensor):
        if value.ndim <= axis or value.shape[axis] != total:
            return value
        first, count = rows[0] if rows else 0, len(rows)
        if list(rows) == list(range(first, first + count)):
            return value.narrow(axis, first, count)
        return value.index_select(axis, torch.tensor(rows, device=value.device))
    if isinstance(value, dict):
        return {key: take(item, rows, total, lists, axis) for key, item in value.items()}
    if lists and isinstance(value, list) and len(value) == total:
        return [value[i] for i in rows]
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(take(item, rows, total, lists) for item in value)
    return value


def take_pictures(value: Any, rows: Sequence[int], total: int) -> Any:
    """Rows of the pictures of an adapter, in each tensor of the containers.

    Where a row has several pictures, they stand together on the first axis.
    """
    if type(value) in (list, tuple):
        return type(value)(take_pictures(item, rows, total) for item in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % total:
        return value
    each = value.shape[0] // total
    return take(value, [row * each + i for row in rows for i in range(each)], value.shape[0])


# entries of the arguments that pipelines hand on to their attention processors
ROWS_WITHIN = ("ip_adapter_image_embeds", "ip_hidden_states", "image_embeds")
SHARED_WITHIN = ("ip_adapter_masks", "scale")


def take_arguments(
    kwargs: dict[str, Any], rows: Sequence[int], total: int, family: Family
) -> dict[str, Any]:
    """``take`` on every argument of the family's denoiser that is split by rows.

    Within a dictionary, pictures of adapters are split by rows, several to a row where there are as
    many, and their masks never are.
    Raises: ``UnsupportedModel`` for a mask of the text that has other rows than the text.
    """
    _check_masks(kwargs, total, family)

    def entry(name: str, value: Any, whole: bool, axis: int) -> Any:
        if name in SHARED_WITHIN or (whole and name not in ROWS_WITHIN):
            return value
        if name in ROWS_WITHIN:
            return take_pictures(value, rows, total)
        return take(value, rows, total, family.lists, axis)

    axes, arguments = family.row_axes, {}
    for name, value in kwargs.items():
        whole = name in family.shared
        if isinstance(value, dict):
            axis = axes.get(name, 0)
            value = {key: entry(key, item, whole, axis) for key, item in value.items()}
        elif not whole:
            value = take(value, rows, total, family.lists, axes.get(name, 0))
        arguments[name] = value
    return arguments


def _check_masks(kwargs: dict[str, Any], total: int, family: Family) -> None:
    """Some pipelines repeat their texts for ``num_images_per_prompt``, and not the masks: whose
    rows are they?"""
    declared = {argument.mask for argument in family.text}
    for name, mask in kwargs.items():
        if name not in declared and not name.startswith("text_embedding_mask"):
            continue
        if isinstance(mask, Tensor) and mask.ndim > 1 and mask.shape[0] not in (1, total):
            raise UnsupportedModel(
                f"Expected {total} rows in {name}, as many as the texts have; got "
                f"{mask.shape[0]}. Use num_images_per_prompt=1 and give each image its own text "
                "and mask."
            )


def _take_groups(value: Any, rows: Sequence[int], total: int) -> Any:
    """``take`` where each of ``total`` rows has as many neighbouring entries as the others."""
    if isinstance(value, list | tuple):
        return type(value)(_take_groups(item, rows, total) for item in value)
    if not isinstance(value, Tensor) or not value.ndim or len(value) % total:
        return value
    count = len(value) // total
    return take(value, [row * count + i for row in rows for i in range(count)], len(value))


def doubled(value: Any, rows: int) -> Any:
    """The inverse of taking one half: every tensor whose first axis is ``rows`` stacked on itself,
    through the containers."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return type(value)({key: doubled(item, rows) for key, item in value.items()})
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(doubled(item, rows) for item in value)
    return value


@functools.cache
def parameter_names(cls: type, method: str = "forward") -> tuple[str, ...]:
    """Names of the positional parameters of a denoiser's forward, or of another method.

    A subclass that takes ``*args`` hands them on, so the names are those of the class above it,
    where there is one that has them all.
    """
    first: tuple[str, ...] = ()
    for base in cls.__mro__:
        if method not in vars(base):
            continue
        parameters = inspect.signature(vars(base)[method]).parameters.values()
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return tuple(p.name for p in parameters)[1:]
        first = first or names
    return first


def count_rows(hidden: Any) -> int:
    """Rows of the denoiser's first argument, a tensor or a list of rows."""
    return len(hidden) if isinstance(hidden, list) else int(hidden.shape[0])


def prediction_of(output: Any) -> Tensor:
    """The prediction ``[rows, ...]`` inside whatever the denoiser returned."""
    inner = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if isinstance(inner, list | tuple):
        return torch.stack(list(inner))
    if not isinstance(inner, Tensor):
        raise TypeError(f"Expected a tensor from the denoiser; got {type(inner).__name__}.")
    return inner


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """``output`` with its prediction replaced, in the same container."""
    inner = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    value = list(prediction.unbind(0)) if isinstance(inner, list | tuple) else prediction
    if isinstance(output, tuple):
        return (value, *output[1:])
    if isinstance(output, Tensor | list):
        return value
    changed = copy.copy(output)
    changed.sample = value
    return changed


def halves_equal(hidden: Any) -> bool:
    """Whether both halves of a batch, a tensor or a list of rows, hold the same values."""
    if isinstance(hidden, list):
        half = len(hidden) // 2
        return all(torch.equal(a, b) for a, b in zip(hidden[:half], hidden[half:]))
    half = hidden.shape[0] // 2
    return torch.equal(hidden[:half], hidden[half:])
