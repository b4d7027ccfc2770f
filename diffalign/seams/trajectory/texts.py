"""Texts of one sampler, encoded once: every segment gets the embeddings of the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffalign.core.types import Pipeline

# embeddings of so many calls are kept; a search uses a few batch sizes
SIZE = 32


class Texts:
    """What the pipeline's own ``encode_prompt`` returned, by its arguments.

    The bits are those of a plain call, and whoever encodes a text in a segment, the pipeline or a
    technique, is answered. Text encoders and tokenizers must not change while a sampler lives.
    """

    def __init__(self) -> None:
        # arguments -> (objects whose identity stands in them, embeddings)
        self._known: dict[Hashable, tuple[list[object], object]] = {}
        # the last pipeline's encoding, and what stands in for it
        self._encode: Callable[..., object] | None = None
        self._answer: Callable[..., object] | None = None

    @contextmanager
    def remembered(self, pipe: Pipeline) -> Iterator[None]:
        """Within the block ``pipe`` encodes no text twice; no gradient goes into the encoders."""
        encode = getattr(pipe, "encode_prompt", None)
        if encode is None:
            yield
            return
        before = pipe.__dict__.get("encode_prompt")
        if self._answer is None or encode != self._encode:
            self._encode, self._answer = encode, self._remembering(encode)
        pipe.__dict__["encode_prompt"] = self._answer
        try:
            yield
        finally:
            if before is None:
                pipe.__dict__.pop("encode_prompt", None)
            else:
                pipe.__dict__["encode_prompt"] = before

    def _remembering(self, encode: Callable[..., object]) -> Callable[..., object]:
        """``encode`` for texts that are new."""

        @functools.wraps(encode)
        def remember(*args: Any, **kwargs: Any) -> Any:
            objects: list[object] = []
            key = _key((args, kwargs), objects)
            if key not in self._known:
                while len(self._known) >= SIZE:
                    del self._known[next(iter(self._known))]
                with torch.no_grad():
                    self._known[key] = (objects, encode(*args, **kwargs))
            return copied(self._known[key][1])

        return remember


def _key(value: object, objects: list[object]) -> Hashable:
    """A key of arguments: plain values by value, everything else by identity (and kept alive)."""
    if value is None or isinstance(value, str | int | float | torch.device | torch.dtype):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), *(_key(item, objects) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _key(item, objects)) for name, item in sorted(value.items())))
    objects.append(value)
    if isinstance(value, Tensor):  # given embeddings may be written over between two calls
        version = None if value.is_inference() else value._version
        return (Tensor, id(value), version)
    return (type(value), id(value))


def copied(value: object) -> Any:
    """``value`` with tensors of its own, through lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return value
