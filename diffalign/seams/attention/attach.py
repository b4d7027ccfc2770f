"""Attention techniques on one generation: which layers, what is installed, what a call becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffalign.core import AttentionTechnique, UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.seams import checkpoints
from diffalign.seams.activity import Activity
from diffalign.seams.attention.caches import Caches
from diffalign.seams.attention.call import CallExtension, CallView, RunningCall
from diffalign.seams.attention.dense import Dense, Usage
from diffalign.seams.attention.intercept import Intercepted, start
from diffalign.seams.attention.kernels import Kernels
from diffalign.seams.attention.native import to_native
from diffalign.seams.attention.seats import Arguments, seats_of
from diffalign.seams.attention.sites import Layer, layers_of, row_parts, site_of, text_length
from diffalign.seams.denoiser.cache import is_compiled
from diffalign.seams.denoiser.call import Denoise, DenoiserCall
from diffalign.seams.denoiser.tap import Generation
from diffalign.seams.swap import intercepted


@contextmanager
def attach(techniques: Sequence[AttentionTechnique], generation: Generation) -> Iterator[None]:
    """``techniques`` act on every denoiser call of a generation until the context is left.

    Raises ``UnsupportedModel`` where one cannot.
    """
    denoisers = generation.family.present(generation.pipe)
    layers = [
        layer
        for name, module in denoisers.items()
        for layer in layers_of(generation.family, name, module)
    ]
    selected = {technique: _selected(technique, layers) for technique in techniques}
    acting = sorted((t for t in techniques if not t.off), key=lambda t: t.order)
    activity = Activity(acting, generation.record)
    complete = False
    try:
        with Attachment(activity, generation, denoisers, layers).installed():
            yield
        complete = True
    finally:
        activity.finish(selected, complete)


def _selected(technique: AttentionTechnique, layers: Sequence[Layer]) -> int:
    """Number of layers that a technique selects; an error when there are none."""
    count = sum(technique.selects(layer.site) for layer in layers)
    if count == 0:
        near = nearest(" ".join(technique.layers or ()), [layer.name for layer in layers])
        raise UnsupportedModel(
            f"{type(technique).__name__} selects no attention layer that sees text. Such "
            f"layers: {near}."
        )
    return count


class Attachment:
    """The attention techniques of one generation, in place."""

    def __init__(
        self,
        activity: Activity[AttentionTechnique],
        generation: Generation,
        denoisers: dict[str, Any],
        layers: Sequence[Layer],
    ) -> None:
        self.activity, self.generation = activity, generation
        self.denoisers, self.layers = denoisers, layers
        self.running = RunningCall(opaque=any(map(is_compiled, denoisers.values())))
        self.caches = Caches(denoisers, generation.evaluator.cached_calls)
        self.kernels = Kernels(generation.record.notes)
        self.usage = Usage()
        self.extensions: dict[AttentionTechnique, CallExtension] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in place, put back on leaving, also after an exception."""
        techniques = self.activity.techniques
        if not techniques:
            yield
            return
        joint = any(layer.kind == "joint" for layer in self.layers)
        longer = joint and any(t.everywhere for t in techniques)
        plan = self.generation.plan
        self.caches.refuse(longer and plan.opened and plan.family.mode == "sequential")
        for technique in techniques:
            extension = technique.extension(self.generation)
            if extension is not None:
                self.extensions[technique] = extension
        layers = [layer for layer in self.layers if layer.chain(techniques)]
        handlers = self.running.handlers
        for layer in layers:
            handlers[layer.module] = ("__call__", functools.partial(self._attend, layer))
        for extension in self.extensions.values():
            handlers.update(extension.handlers(self.running, self.denoisers))
        middleware = self.generation.evaluator.middleware
        with ExitStack() as stack:
            self.generation.record.notes += to_native(layers, stack)
            stack.callback(self._tell)
            stack.enter_context(intercepted(handlers, self.running.opaque))
            checkpoints.remember(self.denoisers.values(), self._snapshot, stack)
            middleware.append(self._around)
            stack.callback(middleware.remove, self._around)
            yield

    def _tell(self) -> None:
        """What ran goes into the report."""
        record = self.generation.record
        record.notes += self.usage.notes()
        record.backends = {name: len(layers) for name, layers in self.usage.layers.items()}

    def _snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        return functools.partial(self.running.at, self.running.view)

    def _around(self, inner: Denoise) -> Denoise:
        """The denoiser with the techniques around it."""

        def denoise(call: DenoiserCall, arguments: dict[str, Any]) -> Any:
            family, module = self.generation.family, self.denoisers[call.denoiser]
            active = self.activity.active(call.step)
            prompt = text_length(family, arguments)
            view = CallView(call.denoiser, active, call.conditioned, prompt)
            extensions = [self.extensions[t] for t in active if t in self.extensions]
            for extension in extensions:
                call, arguments, view = extension.open(call, arguments, view)
            if active:
                view = replace(view, row_parts=row_parts(family, module, arguments))
            self.caches.empty_stale(view)
            with self.running.at(view):
                output = inner(call, arguments)
            for extension in reversed(extensions):
                output = extension.close(output, view)
            return output

        return denoise

    def _attend(
        self,
        layer: Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One layer was called: its own processor runs, and the techniques around its attention."""
        view = self.running.view
        techniques = [] if view is None else layer.chain(view.active)
        if view is None or not techniques:
            return original(*args, **kwargs)

        def attend(call: Arguments, dense: Dense) -> Tensor:
            site = site_of(layer, view, call.q, call.k)
            for technique in techniques:
                if technique.selects(site):
                    self.activity.note(technique, layer.denoiser, layer.name)
            call = replace(call, mask=_one_head(call.mask, layer))
            return start(call, dense, site, techniques, self.kernels)

        seats = seats_of(layer.module)
        with Intercepted(layer.call, seats, layer.name, self.usage, attend) as mode:
            output = original(*args, **kwargs)
        if mode.calls <= layer.call and not self.caches.active[layer.denoiser]:
            raise UnsupportedModel(
                f"{type(layer.module.processor).__name__} at {layer.name!r} made {mode.calls} "
                "calls of attention that diffalign can follow where "
                f"{layer.call + 1} was expected, so {type(techniques[0]).__name__} cannot act "
                "there. Set a processor of diffusers."
            )
        return output


def _one_head(mask: Tensor | None, layer: Layer) -> Tensor | None:
    """A mask [B, 1, ...] where diffusers has repeated it for all heads: kernels want to see that
    it is one."""
    theirs = type(layer.module.processor).__module__.startswith("diffusers.")
    return mask[:, :1] if mask is not None and mask.ndim == 4 and theirs else mask
