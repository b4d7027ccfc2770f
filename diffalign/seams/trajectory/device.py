"""What diffusers asks a pipeline for at each call, found once: its device, from every module, and
the names of its components, from the signature of its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffalign.core.types import Pipeline

_CLASSES: dict[type, type] = {}
_KEYS: dict[type, tuple[list[str], list[str]]] = {}
_NAME = "_diffalign_device"


def _device(pipe: Pipeline) -> torch.device:
    device: torch.device = pipe.__dict__[_NAME]
    return device


def _signature_keys(cls: type, pipe: Pipeline) -> tuple[list[str], list[str]]:
    """The class's own answer, the same for all of its objects."""
    if cls not in _KEYS:
        _KEYS[cls] = super(cls, cls)._get_signature_keys(pipe)  # type: ignore[arg-type]
    modules, others = _KEYS[cls]
    return list(modules), list(others)


def _quick(cls: type) -> type:
    """The cached same-named subclass of a pipeline class that knows its device."""
    if cls not in _CLASSES:
        parts = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_execution_device": property(_device),
            "_get_signature_keys": classmethod(_signature_keys),
            "_diffalign_base": cls.__dict__.get("_diffalign_base", cls),
        }
        _CLASSES[cls] = type(cls)(cls.__name__, (cls,), parts)
    return _CLASSES[cls]


@contextmanager
def known(pipe: Pipeline, device: torch.device) -> Iterator[None]:
    """Within the block the pipeline runs on ``device`` without looking for it."""
    cls = type(pipe)
    pipe.__dict__[_NAME] = device
    object.__setattr__(pipe, "__class__", _quick(cls))
    try:
        yield
    finally:
        object.__setattr__(pipe, "__class__", cls)
        del pipe.__dict__[_NAME]
