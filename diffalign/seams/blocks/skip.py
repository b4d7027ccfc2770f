"""Passes that skip blocks: a skipped block is the identity on each of its streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.families import block_streams
from diffalign.seams.blocks.sites import sites
from diffalign.seams.blocks.streams import Reader, as_output, as_streams, is_offloaded, reader
from diffalign.seams.denoiser.cache import is_compiled_whole
from diffalign.seams.swap import Handler, handler_of, intercepted, original_class, unwrapped


@contextmanager
def skipped(denoiser: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block, and in this context only, calls of the named blocks return their inputs.

    Cost: a skipped block costs nothing, except where it must run and be discarded: in a model
    compiled as a whole (one graph for every choice of blocks, the choice being a tensor) and under
    group offloading (whose order of loading counts the calls).
    """
    model = unwrapped(denoiser)
    handlers: dict[Any, tuple[str, Handler]] = {}
    if is_compiled_whole(denoiser):
        listed = sites(model)
        device = next(model.parameters()).device
        gates = torch.tensor([site.name in names for site in listed], device=device)
        for site, gate in zip(listed, gates.unbind()):
            block = model.get_submodule(site.name)
            read = reader(block, site.streams)
            handlers[block] = ("__call__", partial(_gated, gate, read, handler_of(block)))
    else:
        for name in names:
            block = model.get_submodule(name)
            read = reader(block, block_streams()[original_class(block).__name__])
            identity = _discarded if is_offloaded(block) else _identity
            handlers[block] = ("__call__", partial(identity, read))
    with intercepted(handlers):
        yield


def _identity(
    read: Reader, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return as_output(read(args, kwargs))


def _discarded(
    read: Reader, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    original(*args, **kwargs)
    return as_output(read(args, kwargs))


def _gated(
    gate: Tensor,
    read: Reader,
    technique: Handler | None,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A block of a compiled model, which runs whether it is skipped or not."""
    incoming = read(args, kwargs)
    run = original if technique is None else partial(_through, technique, original)
    output = run(*args, **kwargs)
    outgoing = (
        after if after is None else torch.where(gate, before, after)
        for before, after in zip(incoming, as_streams(output))
    )
    return as_output(tuple(outgoing))


def _through(technique: Handler, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return technique(original, args, kwargs)
