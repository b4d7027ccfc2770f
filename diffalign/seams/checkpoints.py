"""Gradient checkpointing: blocks recomputed in a backward pass see their techniques again."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

Snapshot = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called before a block runs; what it returns puts that moment back, when the block runs again."""

FUNCTION = "_gradient_checkpointing_func"


def remember(denoisers: Iterable[Any], snapshot: Snapshot, stack: ExitStack) -> None:
    """Until ``stack`` closes, blocks that run again do so as they ran at first.

    They may run again in another thread and after the generation.
    """
    for module in (module for denoiser in denoisers for module in denoiser.modules()):
        previous = vars(module).get(FUNCTION)
        if previous is not None and getattr(module, "gradient_checkpointing", False):
            function = functools.partial(_checkpoint, snapshot, previous)
            setattr(module, FUNCTION, function)
            stack.callback(_restore, module, function, previous)


def _checkpoint(
    snapshot: Snapshot,
    checkpoint: Callable[..., Any],
    block: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    moment, runs = snapshot(), itertools.count()

    def run(*inputs: Any, **options: Any) -> Any:
        with moment() if next(runs) else nullcontext():
            return block(*inputs, **options)

    return checkpoint(run, *args, **kwargs)


def _restore(module: Any, function: Any, previous: Any) -> None:
    if vars(module).get(FUNCTION) is function:
        setattr(module, FUNCTION, previous)
