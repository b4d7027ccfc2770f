"""The streams of one block: read from the arguments of its call, put back as it returns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from diffalign.core.blocks import Streams
from diffalign.seams.denoiser.rows import parameter_names
from diffalign.seams.swap import original_class

Reader = Callable[[tuple[Any, ...], dict[str, Any]], Streams]
"""Reads the incoming streams out of the arguments of a block's call."""


def reader(block: nn.Module, streams: Sequence[str]) -> Reader:
    """Reads the streams of these names, parameters of the block's forward."""
    order = parameter_names(original_class(block))
    places = [(order.index(name), name) for name in streams]

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        return tuple(args[i] if i < len(args) else kwargs[name] for i, name in places)

    return read


def as_streams(output: Any) -> Streams:
    """What a block returned, as a tuple; a stream that it drops (context_pre_only) is None."""
    return output if isinstance(output, tuple) else (output,)


def as_output(streams: Streams) -> Any:
    """Streams as a block returns them: a block with one stream returns it as it is."""
    return streams if len(streams) > 1 else streams[0]


def is_offloaded(block: nn.Module) -> bool:
    """Whether group offloading counts the block's calls, so that none may be left out."""
    registries = (getattr(m, "_diffusers_hook", None) for m in block.modules())
    return any(
        "group_offloading" in name
        for registry in registries
        if registry is not None
        for name in registry.hooks
    )
