"""cache-dit beside sessions: its contexts, refreshed when they are stale, and contexts of our own.

cache-dit (https://github.com/vipshop/cache-dit) counts the calls of a transformer and keeps the
residuals of its blocks in contexts, which it makes anew for each generation. It does not know that
a call may have other rows, or be an extra pass. Known here by the attributes that it sets; its code
is not imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffalign.seams.swap import unwrapped


def manager_of(module: Any) -> Any:
    """What holds cache-dit's contexts of a model, None where cache-dit is off."""
    return vars(unwrapped(module)).get("_context_manager")


def separates_branches(module: Any) -> bool:
    """Whether cache-dit keeps the two branches apart, which come one after the other."""
    options = vars(unwrapped(module)).get("_context_kwargs") or {}
    return bool(getattr(options.get("cache_config"), "enable_separate_cfg", False))


def refresh(module: Any) -> None:
    """Begin anew, warm-up included, as cache-dit itself does between generations; nothing where
    somebody has switched it off."""
    manager = manager_of(module)
    for name, options in _options(module).items() if manager is not None else ():
        manager.reset_context(name, **options)


def is_foreign(module: Any, pipe: Any) -> bool:
    """Whether nobody refreshes the contexts when this pipeline is called.

    cache-dit was then enabled on the transformer alone, or on another pipeline that shares it.
    """
    manager = manager_of(module)
    return manager is not None and vars(pipe).get("_context_manager") is not manager


def _options(module: Any) -> dict[str, dict[str, Any]]:
    """The model's contexts, and what each was made with."""
    contexts = manager_of(module)._cached_context_manager
    names = vars(unwrapped(module)).get("_context_names", ())
    return {name: dict(contexts[name]._init_kwargs) for name in names if name in contexts}


class ExtraContexts:
    """Contexts for one kind of call of one model, beside those that cache-dit made itself."""

    def __init__(self, module: Any) -> None:
        self.module, self.manager = module, manager_of(module)
        # name -> context; made at the first call
        self._contexts: dict[str, Any] = {}

    def clear(self) -> None:
        """The next call begins anew."""
        self._contexts = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, calls of the model use these contexts."""
        options = _options(self.module)
        shared = self.manager._cached_context_manager
        self.manager._cached_context_manager = self._contexts
        try:
            for name, values in options.items() if not self._contexts else ():
                self.manager.new_context(**{**_one_branch(values), "name": name})
            yield
        finally:
            self._contexts = self.manager._cached_context_manager
            self.manager._cached_context_manager = shared


def _one_branch(options: dict[str, Any]) -> dict[str, Any]:
    """What a context is made with, for calls that are all of one kind."""
    config = copy.deepcopy(options["cache_config"])
    config.enable_separate_cfg, config.num_inference_steps = False, None
    return {**options, "cache_config": config}
