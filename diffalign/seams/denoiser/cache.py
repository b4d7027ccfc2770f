"""Compiled models and feature caches: what they forbid, and how a cache is emptied without losing
its place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffalign.core import Pass, UnsupportedModel


def keeps_both(module: Any) -> bool:
    """Whether the model's cache takes the halves of every batch for the two branches."""
    return type(getattr(module, "_cache_config", None)).__name__ == "FasterCacheConfig"


def check_rows(module: Any, rows: int, whole: int) -> None:
    """Raise ``UnsupportedModel`` where a cache of the model cannot take some of the rows."""
    if rows != whole and keeps_both(module):
        raise UnsupportedModel(
            "FasterCache takes the first half of every batch for one branch, so a guidance that "
            f"runs {rows} of {whole} rows would mix images up. Disable the cache, or use da.CFG."
        )


def fixed_rows(module: Any) -> bool:
    """Whether row counts must stay {B, 2B}: the module is compiled, in whole or in part, or runs a
    feature cache."""
    if getattr(module, "is_cache_enabled", False) or hasattr(module, "_orig_mod"):
        return True
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules())


def empty_cache(module: Any) -> None:
    """Forget what a model's feature cache holds, but not in which cache context the pipeline is
    calling."""
    hooks = [
        hook
        for m in module.modules()
        if hasattr(m, "_diffusers_hook")
        for hook in m._diffusers_hook.hooks.values()
    ]
    held = [
        (part, part._context)
        for hook in hooks
        for part in vars(hook).values()
        if hasattr(part, "_context")
    ]
    module._reset_stateful_cache()
    for part, context in held:
        part.set_context(context)


def cache_context(module: Any, p: Pass) -> AbstractContextManager[Any]:
    return (
        module.cache_context(p.name)
        if getattr(module, "is_cache_enabled", False)
        else nullcontext()
    )
