"""Model files of others: found on disk or on the hub, read without running what they hold, and
loaded only where every weight fits."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffalign.core.errors import listed
from diffalign.embedded.load import quiet

Source = str | PathLike[str]
Foreign = Any
"""An object of another library whose classes say nothing about types."""
ModelT = TypeVar("ModelT", bound=nn.Module)
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)


def file_of(source: Source, names: tuple[str, ...], owner: str, revision: str | None) -> Path:
    """The path of a model file: ``source`` itself, or the first of ``names`` in the folder or hub
    repository ``source``. Raises: ValueError where there is none, or the hub cannot be reached."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{owner}: the folder {str(source)!r} holds no {listed(names)}.")
    from huggingface_hub import hf_hub_download

    error: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(str(source), name, revision=revision))
        except Exception as problem:  # the hub's errors have no common class
            error = error or problem
    raise ValueError(
        f"{owner}: {listed(names)} was not found at {str(source)!r}, which is no file and no "
        "folder here. Pass source= a local file or folder, or connect to the hub."
    ) from error


def tensors_of(path: Path, owner: str) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file, or of a PyTorch file read with ``weights_only``; the
    usual wrappings ("state_dict", "model", "module.") are taken off.

    Raises: ValueError for a damaged file and for a pickle of other objects, which is not read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        data: Foreign = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{owner}: {path.name} is damaged, or holds Python objects, which are not read because "
            "they can run any code. Pass a file of weights only: a safetensors file or a saved "
            "state_dict."
        ) from error
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(
            f"{owner}: {path.name} cannot be read: {error}. Is it whole? Fetch it again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{owner}: {path.name} is no table of weights by name.")
    return {name.removeprefix("module."): tensor for name, tensor in data.items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], owner: str, what: str) -> None:
    """Load every weight of ``module``. Raises: ValueError where one is missing, left over or of
    another shape."""
    present = module.state_dict()
    missing, extra = (
        sorted(present.keys() - tensors.keys()),
        sorted(tensors.keys() - present.keys()),
    )
    shapes = [
        name
        for name in present.keys() & tensors.keys()
        if present[name].shape != tensors[name].shape
    ]
    if missing or extra or shapes:
        told = [
            f"{len(names)} {word} ({', '.join(names[:3])})"
            for names, word in (
                (missing, "missing"),
                (extra, "unknown"),
                (sorted(shapes), "of another shape"),
            )
            if names
        ]
        raise ValueError(f"{owner}: the file is not that of {what}: {'; '.join(told)} weights.")
    module.load_state_dict(dict(tensors))


@contextmanager
def silent_start() -> Iterator[None]:
    """Without progress bars, and with the global generator as it was: random start values of
    weights that a file then replaces are not ours to spend."""
    with torch.random.fork_rng(devices=[]), quiet():
        yield


def pretrained(
    cls: type[ModelT],
    source: Source,
    owner: str,
    revision: str | None = None,
    unused: str = "",
    **options: object,
) -> ModelT:
    """A model of a transformers class from a hub id or a folder, in eval mode; weights whose names
    begin with ``unused`` may be missing.

    Raises: ValueError where it cannot be found or read, or does not hold every weight.
    """
    from safetensors import SafetensorError

    load: Foreign = cls
    try:
        with silent_start():
            model, report = load.from_pretrained(
                source, revision=revision, output_loading_info=True, use_safetensors=None, **options
            )
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(
            f"{owner}: no {cls.__name__} could be loaded from {str(source)!r}: {error}"
        ) from error
    lacking = sorted(
        key for key in report["missing_keys"] if not (unused and key.startswith(unused))
    )
    other = sorted(str(item) for item in report["mismatched_keys"])
    if lacking or other:
        raise ValueError(
            f"{owner}: {str(source)!r} is no complete {cls.__name__}: {len(lacking)} weights are "
            f"missing and {len(other)} of another shape ({', '.join([*lacking, *other][:3])})."
        )
    model.eval()
    filled: ModelT = model
    return filled


def tokenizer_of(source: Source, owner: str, revision: str | None = None) -> Foreign:
    """The tokenizer in a folder or at a hub id. Raises: ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, revision=revision)
    except DAMAGED as error:
        raise ValueError(
            f"{owner}: no tokenizer could be loaded from {str(source)!r}: {error}. Pass "
            "tokenizer= a folder or a hub id."
        ) from error
