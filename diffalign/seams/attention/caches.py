"""Feature caches of diffusers beside attention techniques: which are refused, when one is stale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.core import UnsupportedModel
from diffalign.seams.attention.call import CallView
from diffalign.seams.denoiser.cache import config_name, is_cached
from diffalign.seams.denoiser.cache_dit import manager_of, separates_branches
from diffalign.seams.denoiser.cached_calls import CachedCalls

# caches that reuse what an attention technique changes between calls
REFUSED = {
    "FasterCacheConfig": "it skips the unconditional rows inside the model",
    "TextKVCacheConfig": "it keeps text keys from call to call",
}


class Caches:
    """The feature caches of one generation's denoisers."""

    def __init__(self, denoisers: Mapping[str, Any], calls: CachedCalls) -> None:
        self.denoisers, self.calls = denoisers, calls
        # denoiser -> whether it runs a cache
        self.active = {name: is_cached(module) for name, module in denoisers.items()}
        # denoiser -> with which techniques and added texts its cache was filled
        self._filled: dict[str, Any] = {}

    def refuse(self, two_lengths: bool, changes: bool) -> None:
        """Raise ``UnsupportedModel`` for a cache that cannot live beside the techniques.

        ``two_lengths``: the branches come in calls of their own with texts of unequal lengths.
        ``changes``: a pass of the guidance changes attention layers.
        """
        for module in self.denoisers.values():
            config = config_name(module)
            if config in REFUSED:
                raise UnsupportedModel(
                    f"{config} cannot be combined with attention techniques: {REFUSED[config]}. "
                    "Disable the cache."
                )
            if config == "PyramidAttentionBroadcastConfig" and changes:
                raise UnsupportedModel(
                    f"{config} cannot be combined with a guidance that changes attention in a pass "
                    "of its own: it hands attention outputs of one pass to the next. Disable the "
                    "cache."
                )
            if config == "PyramidAttentionBroadcastConfig" and two_lengths:
                raise UnsupportedModel(
                    f"{config} cannot be combined with NAG here: it hands attention outputs of one "
                    "branch to the other, which has another text length. Disable the cache."
                )
            if manager_of(module) is not None and two_lengths and not separates_branches(module):
                raise UnsupportedModel(
                    "cache-dit keeps one cache for both branches here, and with NAG their texts "
                    "have different lengths. Enable it with "
                    "DBCacheConfig(enable_separate_cfg=True, ...)."
                )

    def empty_stale(self, view: CallView) -> None:
        """Empty a cache that was filled with other techniques, or with other shapes."""
        name = view.denoiser
        if not self.active[name] or not any(view.conditioned):
            return
        contents = (view.active, bool(view.added), bool(view.copies))
        if self._filled.setdefault(name, contents) != contents:
            self.calls.empty(self.denoisers[name])
            self._filled[name] = contents
