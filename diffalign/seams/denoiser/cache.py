"""Compiled models and feature caches: what they forbid, and how a cache is emptied without losing
its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffalign.core import UnsupportedModel
from diffalign.seams.denoiser import cache_dit
from diffalign.seams.swap import unwrapped

# modules of diffusers.hooks
CACHES = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)
# caches of diffusers that keep one state for each cache context; others have one for all calls
KEYED = (
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "SeaCacheConfig",
    "TaylorSeerCacheConfig",
    "TextKVCacheConfig",
)


def is_cached(module: Any) -> bool:
    """Whether the model runs a feature cache, of diffusers or cache-dit's."""
    model = unwrapped(module)
    return cache_dit.manager_of(model) is not None or bool(
        getattr(model, "is_cache_enabled", False)
    )


def config_name(module: Any) -> str:
    """Class name of the configuration of the model's cache of diffusers."""
    # getattr on a module without it would build an error message at every step
    return type(vars(unwrapped(module)).get("_cache_config")).__name__


def is_keyed(module: Any) -> bool:
    """Whether the model's cache keeps the calls of different cache contexts apart."""
    return cache_dit.manager_of(module) is not None or config_name(module) in KEYED


def is_compiled(module: Any) -> bool:
    """Whether the model is compiled, in whole or in part."""
    return any(map(_has_graph, module.modules()))


def is_compiled_whole(module: Any) -> bool:
    """Whether one compiled call covers the whole model; blocks compiled one by one do not count."""
    model = unwrapped(module)
    for part in module.modules():  # wrappers come before what they wrap
        if _has_graph(part):
            return True
        if part is model:
            break
    return False


def _has_graph(part: Any) -> bool:
    return "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None


def keeps_both(module: Any) -> bool:
    """Whether the model's cache takes the halves of every batch for the two branches."""
    config = vars(unwrapped(module)).get("_cache_config")
    return type(config).__name__ == "FasterCacheConfig" and not config.is_guidance_distilled


def check_branches(module: Any, passes: int) -> None:
    """Raise ``UnsupportedModel`` where a cache of the model wants two branches and a guidance of
    several ``passes`` runs one of them."""
    if passes > 1 and keeps_both(module):
        raise UnsupportedModel(
            "FasterCache takes the first half of every batch for the unconditional branch, which "
            "this guidance does not run, so it would mix images up. Disable the cache."
        )


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
    return is_cached(module) or is_compiled(module)


def empty_cache(module: Any) -> None:
    """Forget what a model's feature cache holds, but not in which cache context the pipeline is
    calling."""
    if cache_dit.manager_of(module) is not None:
        cache_dit.refresh(module)
        return
    hooks = [
        hook
        for m in module.modules()
        if hasattr(m, "_diffusers_hook")
        for hook in m._diffusers_hook.hooks.values()
    ]
    contexts = [
        (part, part._context)
        for hook in hooks
        for part in vars(hook).values()
        if hasattr(part, "_context")
    ]
    unwrapped(module)._reset_stateful_cache()
    for part, context in contexts:
        part.set_context(context)


@contextmanager
def uncached(module: Any) -> Iterator[None]:
    """Within the block the model computes everything: its cache neither gives nor takes.

    For passes of our own. Their blocks differ from those that filled the cache, some caches count
    calls, and some keep no branches apart.
    """
    changed: list[tuple[Any, dict[str, Any]]] = []
    for hook in _cache_hooks(module) if is_cached(module) else ():
        reference = hook.fn_ref
        changed.append((reference, dict(vars(reference))))
        if reference.original_forward is not None:
            reference.forward = reference.original_forward
        reference.pre_forward, reference.post_forward = _arguments, _output
    try:
        yield
    finally:
        for reference, before in changed:
            vars(reference).update(before)


def _cache_hooks(module: Any) -> Iterator[Any]:
    """Hooks of diffusers' feature caches, and none of offloading or casting."""
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            if type(hook).__module__.rpartition(".")[2] in CACHES:
                yield hook


def _arguments(module: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _output(module: Any, output: Any) -> Any:
    return output
