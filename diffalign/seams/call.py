"""One call of a pipeline with active sessions: taps in place, the pipeline's own call, a report."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffalign.core import (
    AttentionTechnique,
    BlockTechnique,
    Meter,
    SessionError,
    Technique,
    TokenTechnique,
)
from diffalign.seams import swap
from diffalign.seams.denoiser import cache_dit
from diffalign.seams.denoiser.tap import Generation
from diffalign.seams.plan import plan
from diffalign.seams.published import published

if TYPE_CHECKING:
    from diffalign.seams.session import Session

_BUSY: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def generate(
    pipe: Any,
    sessions: Sequence[Session],
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What ``pipe(...)`` does while ``sessions``, outermost first, are active on it.

    Raises: ``SessionError`` when the pipeline is already generating in a session.
    """
    lock = _BUSY.setdefault(pipe, threading.Lock())
    if not lock.acquire(blocking=False):
        raise SessionError(
            "This pipeline is already generating in a session; run one generation at a time per "
            "pipeline object."
        )
    try:
        family = sessions[0].family
        techniques = [technique for session in sessions for technique in session.techniques]
        meter = Meter(others=tuple(session.meter for session in sessions))
        planned = plan(pipe, family, techniques, args, kwargs, meter)
        generation = Generation(pipe, planned, meter, sessions[-1].start)
        for session in sessions:
            session.generation = generation
        with tapped(generation), published(generation), swap.beneath(pipe):
            result = original(**planned.arguments)
        report = generation.report()
        for session in sessions:
            session.finish(report, generation)
        return result
    finally:
        for session in sessions:
            session.generation = None
        lock.release()


@contextmanager
def tapped(generation: Generation) -> Iterator[None]:
    """Taps on denoisers and scheduler, and the techniques of the other seams, for one call."""
    pipe, family = generation.pipe, generation.family
    handlers: dict[Any, tuple[str, swap.Handler]] = {}
    for name in family.denoisers:
        module = getattr(pipe, name, None)
        if module is not None:
            handlers[module] = ("__call__", functools.partial(generation.denoise, name, module))
    for name in () if generation.plan.guess_mode else family.companions:
        module = getattr(pipe, name, None)
        if module is not None:
            handlers[module] = ("__call__", functools.partial(generation.accompany, module))
    handlers[pipe.scheduler] = ("step", generation.scheduler_step)
    announced = pipe.__dict__.pop("_num_timesteps", None)
    try:
        with ExitStack() as stack:
            stack.enter_context(swap.intercepted(handlers))
            if generation.plan.guidances or generation.plan.others:
                _begin_caches(generation, stack)
            _attach(generation, generation.plan.others, stack)
            yield
    finally:
        if announced is not None:
            pipe.__dict__.setdefault("_num_timesteps", announced)


def _begin_caches(generation: Generation, stack: ExitStack) -> None:
    """Contexts of cache-dit that nobody else makes anew for this pipeline: before the call, since
    they hold another image, and after it, since techniques may have changed what they count."""
    for module in generation.family.present(generation.pipe).values():
        if cache_dit.is_foreign(module, generation.pipe):
            cache_dit.refresh(module)
            stack.callback(cache_dit.refresh, module)


def _attach(generation: Generation, techniques: Sequence[Technique], stack: ExitStack) -> None:
    """Install the techniques of the other seams, by seam and never by the user's order."""
    attention = [t for t in techniques if isinstance(t, AttentionTechnique)]
    pruning = next((t for t in techniques if isinstance(t, TokenTechnique) and not t.off), None)
    guidances = generation.plan.guidances.values()
    if attention or pruning or any(p.attention for g in guidances for p in g.extra_passes):
        from diffalign.seams.attention.attach import attach

        stack.enter_context(attach(attention, generation, pruning))
    blocks = [t for t in techniques if isinstance(t, BlockTechnique)]
    if blocks:
        from diffalign.seams.blocks.attach import attach as attach_blocks

        stack.enter_context(attach_blocks(blocks, generation))
