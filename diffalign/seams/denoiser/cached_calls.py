"""The calls of one generation on models with feature caches: where each belongs, and when what a
cache holds is of no use to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from diffalign.core import Pass, StepInfo
from diffalign.seams.denoiser import cache_dit
from diffalign.seams.denoiser.cache import empty_cache, is_cached, is_keyed, uncached

Kind = tuple[int, str]
"""A model by its id, and which of its calls: ``""`` for the pipeline's own."""


@dataclass(frozen=True, slots=True)
class _Last:
    """The last call of a kind."""

    rows: int
    # blocks that it skipped
    blocks: tuple[str, ...] | None
    # evaluation of the run, counted from 1
    evaluation: int


class CachedCalls:
    """What is known of the calls so far.

    A cache is emptied before a call that has other rows than the last of its kind, skips other
    blocks, or comes after a step without one.
    """

    def __init__(self, alternating: bool = False) -> None:
        # the pipeline calls its model once for each branch, the conditional one first
        self.alternating = alternating
        self._last: dict[Kind, _Last] = {}
        self._extra: dict[Kind, cache_dit.ExtraContexts] = {}
        # model -> whether its last call of the pipeline's own kind had the prompt
        self._conditioned: dict[int, bool] = {}
        # models whose branches no longer take turns, as cache-dit expects
        self._apart: set[int] = set()
        # models whose shared contexts are stale
        self._stale: set[int] = set()
        self._running: cache_dit.ExtraContexts | None = None
        self._evaluation, self._step = 0, (-1, 0)

    def around(
        self, module: Any, group: Sequence[Pass], rows: int, step: StepInfo
    ) -> AbstractContextManager[None]:
        """What one call with ``rows`` rows for the passes ``group`` runs in."""
        if not is_cached(module):
            return nullcontext()
        if (step.index, step.evaluation) != self._step:
            self._step = (step.index, step.evaluation)
            self._evaluation += 1
        p = group[0]
        kind, theirs = self._kind(module, p), cache_dit.manager_of(module) is None
        if p.alone and theirs:  # its blocks are not those that filled the cache
            return uncached(module)
        stale = self._is_stale(module, p, rows)
        if stale and theirs:  # all kinds of calls are emptied together
            self._last = {key: last for key, last in self._last.items() if key[0] != id(module)}
            empty_cache(module)
        self._last[kind] = _Last(rows, p.blocks, self._evaluation)
        if not theirs:
            return self._with_cache_dit(module, p, stale)
        return nullcontext()

    def empty(self, module: Any) -> None:
        """Forget everything that the model's cache holds, in every kind of call."""
        empty_cache(module)
        for (model, _), contexts in self._extra.items():
            if model == id(module):
                contexts.clear()
        if self._running is not None:  # what was emptied just now is not what the pipeline uses
            self._stale.add(id(module))

    def _kind(self, module: Any, p: Pass) -> Kind:
        name = p.name if p.alone or self.alternating else ""
        return id(module), name if is_keyed(module) else ""

    def _is_stale(self, module: Any, p: Pass, rows: int) -> bool:
        last = self._last.get(self._kind(module, p))
        if last is None:
            return False
        if not is_keyed(module):
            return last.rows != rows
        gap = self._evaluation - last.evaluation > 1
        return gap or (last.rows, last.blocks) != (rows, p.blocks)

    def _with_cache_dit(self, module: Any, p: Pass, stale: bool) -> AbstractContextManager[None]:
        kind, model = self._kind(module, p), id(module)
        if not p.alone and not self._leaves_turns(model, p):
            if stale or model in self._stale:
                self._stale.discard(model)
                cache_dit.refresh(module)
            return nullcontext()
        if kind not in self._extra:
            self._extra[kind] = cache_dit.ExtraContexts(module)
        if stale:
            self._extra[kind].clear()
        return self._in(self._extra[kind])

    def _leaves_turns(self, model: int, p: Pass) -> bool:
        """Whether a branch was left out, so that cache-dit would take one for the other."""
        if self.alternating:
            if self._conditioned.get(model, False) is p.conditioned:
                self._apart.add(model)
            self._conditioned[model] = p.conditioned
        return model in self._apart

    @contextmanager
    def _in(self, contexts: cache_dit.ExtraContexts) -> Iterator[None]:
        self._running = contexts
        try:
            with contexts.active():
                yield
        finally:
            self._running = None
