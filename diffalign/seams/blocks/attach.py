"""Block techniques on one generation: where they act, and what a block's call becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffalign.core import BlockSite, BlockTechnique, UnsupportedModel
from diffalign.core.blocks import Streams
from diffalign.core.registry import name_of
from diffalign.seams import checkpoints
from diffalign.seams.activity import Activity
from diffalign.seams.blocks.sites import sites
from diffalign.seams.blocks.states import BlockStates, rows_of
from diffalign.seams.blocks.streams import Reader, as_output, as_streams, is_offloaded, reader
from diffalign.seams.denoiser.cache import is_compiled_whole
from diffalign.seams.denoiser.call import Denoise, DenoiserCall
from diffalign.seams.swap import Handler, in_place, intercepted, original_class, unwrapped

if TYPE_CHECKING:
    from diffalign.seams.denoiser.tap import Generation


@contextmanager
def attach(techniques: Sequence[BlockTechnique[Any]], generation: Generation) -> Iterator[None]:
    """``techniques`` act at their blocks in every denoiser call until the context is left.

    The first is outermost. Raises ``UnsupportedModel`` where one selects no block.
    """
    places = [
        place
        for name, module in generation.family.present(generation.pipe).items()
        for place in places_of(name, module)
    ]
    selected = {t: sum(t.selects(place.site) for place in places) for t in techniques}
    for technique, count in selected.items():
        if not count:
            blocks = ", ".join(place.site.name for place in places)
            raise UnsupportedModel(
                f"{type(technique).__name__} selects no transformer block of "
                f"{original_class(generation.pipe).__name__}. "
                + (f"Its blocks: {blocks}." if blocks else "diffalign knows none of its blocks.")
            )
    # denoisers that make passes in place of the pipeline's have blocks of their own
    others = [
        place
        for name, guidance in generation.plan.guidances.items()
        for p in guidance.extra_passes
        if p.module is not None
        for place in places_of(name, p.module)
    ]
    activity = Activity([t for t in techniques if not t.off], generation.record)
    complete = False
    try:
        with Attachment(activity, generation, [*places, *others]).installed():
            yield
        complete = True
    finally:
        activity.finish(selected, complete)


@dataclass(frozen=True, slots=True)
class Place:
    """One block in place."""

    # attribute of the pipeline that holds its denoiser
    denoiser: str
    block: nn.Module
    site: BlockSite
    # whose block it is: that denoiser, or one that makes passes in its place
    model: nn.Module


def places_of(denoiser: str, model: nn.Module) -> list[Place]:
    """The blocks of one model."""
    bare = unwrapped(model)
    return [Place(denoiser, bare.get_submodule(site.name), site, model) for site in sites(model)]


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a denoiser call is: the techniques that act in it and their states so far."""

    call: DenoiserCall
    states: Mapping[BlockTechnique[Any], Any]


class Attachment:
    """The block techniques of one generation, in place."""

    def __init__(
        self,
        activity: Activity[BlockTechnique[Any]],
        generation: Generation,
        places: Sequence[Place],
    ) -> None:
        self.activity, self.generation, self.places = activity, generation, places
        self.handlers: dict[Any, tuple[str, Handler]] = {}
        # of the running call, None between calls
        self.moment: Moment | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in place, put back on leaving, also after an exception."""
        techniques = self.activity.techniques
        for place in self.places:
            if any(t.selects(place.site) for t in techniques):
                read = reader(place.block, place.site.streams)
                whole = is_compiled_whole(place.model)
                handler = _run_then_decide if whole or is_offloaded(place.block) else _decide
                call = functools.partial(handler, self, place, read)
                self.handlers[place.block] = ("__call__", call)
        middleware = self.generation.evaluator.middleware
        with ExitStack() as stack:
            stack.enter_context(intercepted(self.handlers))
            models = {id(place.model): place.model for place in self.places}
            checkpoints.remember(models.values(), self._snapshot, stack)
            middleware.append(self._around)
            stack.callback(middleware.remove, self._around)
            yield

    def _snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        return functools.partial(self._at, self.moment)

    @contextmanager
    def _at(self, moment: Moment | None) -> Iterator[None]:
        """Within one denoiser call, or a part of it that is recomputed."""
        before, self.moment = self.moment, moment
        try:
            with nullcontext() if in_place(self.handlers) else intercepted(self.handlers):
                yield
        finally:
            self.moment = before

    def _around(self, inner: Denoise) -> Denoise:
        """The denoiser with the techniques at its blocks."""

        def denoise(call: DenoiserCall, arguments: dict[str, Any]) -> Any:
            active = self.activity.active(call.step)
            if not active:
                return inner(call, arguments)
            rows, states = rows_of(call, self.generation.batch), self.generation.states
            known = {t: states.get(name_of(t)) or BlockStates() for t in active}
            moment = Moment(call, {t: known[t].of(call.denoiser, rows, t.init) for t in active})
            with self._at(moment):
                output = inner(call, arguments)
                assert self.moment is not None
                after = self.moment.states
            for t in active:
                states[name_of(t)] = known[t].after(call.denoiser, rows, after[t])
            return output

        return denoise

    def decide(self, place: Place, incoming: Streams, block: Callable[[], Streams]) -> Streams:
        """The outgoing streams of one block: every technique around it has its say."""
        moment = self.moment
        if moment is None:
            return block()
        for technique in reversed(list(moment.states)):
            if technique.selects(place.site):
                self.activity.note(technique, place.denoiser, place.site.name)
                block = functools.partial(self._one, technique, place, incoming, block)
        return block()

    def _one(
        self,
        technique: BlockTechnique[Any],
        place: Place,
        incoming: Streams,
        block: Callable[[], Streams],
    ) -> Streams:
        moment = self.moment
        assert moment is not None
        state = moment.states[technique]
        outgoing, state = technique.around(block, incoming, place.site, moment.call.step, state)
        assert self.moment is not None  # techniques further in may have changed theirs
        self.moment = replace(self.moment, states={**self.moment.states, technique: state})
        return outgoing


def _decide(
    attachment: Attachment,
    place: Place,
    read: Reader,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A block was called: it runs if a technique asks for it."""
    if attachment.moment is None:
        return original(*args, **kwargs)
    incoming = read(args, kwargs)
    return as_output(
        attachment.decide(place, incoming, lambda: as_streams(original(*args, **kwargs)))
    )


def _run_then_decide(
    attachment: Attachment,
    place: Place,
    read: Reader,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A block was called that must run in any case: its output is used if a technique asks for it.

    In a model compiled as a whole the block stays in its graph, the same at every step.
    """
    incoming = read(args, kwargs)
    return _outside_graph(attachment, place, incoming, original(*args, **kwargs))


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _outside_graph(attachment: Attachment, place: Place, incoming: Streams, output: Any) -> Any:
    return as_output(attachment.decide(place, incoming, lambda: as_streams(output)))
