"""Transformer blocks of a denoiser: which there are, in what order their streams leave them, and
how one is skipped for a while.

A skipped block is the identity on each of its streams. The order in which a block returns them
differs between classes, so the families say it; ``tests/seams/blocks/test_sites.py`` checks each
with text and image sequences of unequal lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core import UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.families import block_streams
from diffalign.seams.denoiser.rows import parameter_names
from diffalign.seams.swap import Handler, intercepted, original_class


@dataclass(frozen=True, slots=True)
class BlockSite:
    """One block. ``name``: dotted name in the denoiser; ``streams``: forward parameters it returns,
    in that order.

    ``edge``: why it is not skipped unless asked for by name: "first", "last" or "context_pre_only";
    None for all others.
    """

    name: str
    streams: tuple[str, ...]
    edge: str | None = None


def sites(denoiser: nn.Module) -> tuple[BlockSite, ...]:
    """The blocks that can be skipped, in the order in which they run. Empty for an architecture
    whose family lists none.

    Text and noise refiners (Lumina2, Z-Image) are not listed: they prepare one stream for the
    others.
    """
    module, streams = getattr(denoiser, "_orig_mod", denoiser), block_streams()
    found: list[tuple[str, nn.Module]] = []
    for stack, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) and "refiner" not in stack:
            found += [
                (f"{stack}.{i}", b)
                for i, b in enumerate(blocks)
                if original_class(b).__name__ in streams
            ]
    # a U-Net registers its middle last
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found.sort(key=lambda item: stage.get(item[0].partition(".")[0], 0))
    last = len(found) - 1
    return tuple(
        BlockSite(
            name,
            streams[original_class(block).__name__],
            "context_pre_only"
            if getattr(block, "context_pre_only", False)
            else "first"
            if i == 0
            else "last"
            if i == last
            else None,
        )
        for i, (name, block) in enumerate(found)
    )


def select(
    owner: str, option: str, denoiser: nn.Module, wanted: Sequence[int | str] | None
) -> tuple[str, ...]:
    """Names of the blocks that ``wanted`` picks: positions from 0, names, or patterns such as
    ``"single_transformer_blocks.*"``.

    None picks every block but the first, the last and those that drop a stream. Raises
    ``UnsupportedModel`` when nothing is picked.
    """
    listed = sites(denoiser)
    kind = original_class(getattr(denoiser, "_orig_mod", denoiser)).__name__
    if not listed:
        raise UnsupportedModel(
            f"{owner} skips transformer blocks, and diffalign knows none in {kind}; use a "
            "guidance without block skipping."
        )
    if wanted is None:
        inner = tuple(site.name for site in listed if site.edge is None)
        if not inner:
            raise UnsupportedModel(
                f"{owner}: {kind} has only {len(listed)} blocks, and the first and last are not "
                f"skipped by default. Pass {option}=..."
            )
        return inner
    names = [site.name for site in listed]
    chosen: dict[str, None] = {}
    for item in wanted:
        if isinstance(item, int):
            if not 0 <= item < len(names):
                raise UnsupportedModel(
                    f"{owner}({option}=...): {kind} has blocks 0 to {len(names) - 1}; got {item}."
                )
            chosen[names[item]] = None
            continue
        matching = [name for name in names if fnmatchcase(name, item)]
        if not matching:
            raise UnsupportedModel(
                f"{owner}({option}=...): {kind} has no block {item!r}. Nearest: "
                f"{nearest(item, names)}."
            )
        chosen.update(dict.fromkeys(matching))
    return tuple(chosen)


@contextmanager
def skipped(denoiser: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block, and in this context only, calls of the named blocks return their inputs.

    Cost: a skipped block costs nothing, except where it must run and be discarded: in a model
    compiled as a whole (one graph for every choice of blocks, the choice being a tensor) and under
    group offloading (whose order of loading counts the calls).
    """
    module = getattr(denoiser, "_orig_mod", denoiser)
    compiled = module is not denoiser or getattr(module, "_compiled_call_impl", None) is not None
    handlers: dict[Any, tuple[str, Handler]] = {}
    if compiled:
        listed = sites(module)
        gates = torch.tensor(
            [site.name in names for site in listed], device=next(module.parameters()).device
        )
        for site, gate in zip(listed, gates.unbind()):
            block = module.get_submodule(site.name)
            handlers[block] = ("__call__", partial(_gated, gate, _reader(block, site.streams)))
    else:
        for name in names:
            block = module.get_submodule(name)
            streams = _reader(block, block_streams()[original_class(block).__name__])
            handlers[block] = (
                "__call__",
                partial(_discarded if _offloaded(block) else _identity, streams),
            )
    with intercepted(handlers):
        yield


Reader = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, ...]]


def _reader(block: nn.Module, streams: Sequence[str]) -> Reader:
    """Reads the incoming streams out of a call's arguments."""
    order = parameter_names(original_class(block))
    places = [(order.index(name), name) for name in streams]

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(args[i] if i < len(args) else kwargs[name] for i, name in places)

    return read


def _identity(
    read: Reader, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    streams = read(args, kwargs)
    return streams if len(streams) > 1 else streams[0]


def _discarded(
    read: Reader, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    original(*args, **kwargs)
    return _identity(read, original, args, kwargs)


def _gated(
    gate: Tensor,
    read: Reader,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    streams, done = read(args, kwargs), original(*args, **kwargs)
    if len(streams) == 1:
        return torch.where(gate, streams[0], done)
    # a block that drops a stream (context_pre_only) returns None for it
    return tuple(
        after if after is None else torch.where(gate, before, after)
        for before, after in zip(streams, done)
    )


def _offloaded(block: nn.Module) -> bool:
    registries = (getattr(m, "_diffusers_hook", None) for m in block.modules())
    return any(
        "group_offloading" in name
        for registry in registries
        if registry is not None
        for name in registry.hooks
    )
