"""Attention techniques and what passes change in attention: which layers, what is installed, what a
call becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffalign.core import AttentionTechnique, TokenTechnique, UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.families.family import Family
from diffalign.families.layout import Grid
from diffalign.seams import checkpoints
from diffalign.seams.activity import Activity
from diffalign.seams.attention.caches import Caches
from diffalign.seams.attention.call import CallExtension, CallView, RunningCall
from diffalign.seams.attention.dense import Dense, Usage
from diffalign.seams.attention.intercept import Intercepted, start
from diffalign.seams.attention.kernels import Kernels
from diffalign.seams.attention.native import to_native
from diffalign.seams.attention.seats import Arguments, seats_of
from diffalign.seams.attention.sites import (
    Layer,
    layers_of,
    map_layers,
    row_parts,
    site_of,
    text_length,
)
from diffalign.seams.denoiser.cache import is_compiled
from diffalign.seams.denoiser.cached_calls import CachedCalls
from diffalign.seams.denoiser.call import Denoise, DenoiserCall
from diffalign.seams.denoiser.tap import Generation
from diffalign.seams.swap import intercepted, unwrapped
from diffalign.seams.tokens.attach import Tokens


@contextmanager
def attach(
    techniques: Sequence[AttentionTechnique],
    generation: Generation,
    pruning: TokenTechnique[Any] | None = None,
) -> Iterator[None]:
    """``techniques`` act on every denoiser call of a generation until the context is left; what
    passes of its guidance change acts on theirs, and ``pruning`` leaves image tokens out of them.

    Raises ``UnsupportedModel`` where one cannot.
    """
    family, denoisers = generation.family, generation.family.present(generation.pipe)
    passes = [
        (name, p)
        for name, guidance in generation.plan.guidances.items()
        for p in guidance.extra_passes
    ]
    changes = tuple(dict.fromkeys(p.attention for _, p in passes if p.attention is not None))
    layers = [
        layer
        for name, module in denoisers.items()
        for layer in layers_for(family, name, module, techniques, changes)
    ]
    selected = {technique: _selected(technique, layers) for technique in (*techniques, *changes)}
    acting = sorted((t for t in techniques if not t.off), key=lambda t: t.order)
    # denoisers that make passes in place of the pipeline's have layers of their own
    others = {f"{name} of {p.name}": p.module for name, p in passes if p.module is not None}
    layers += [
        layer
        for name, p in passes
        if p.module is not None
        for layer in layers_for(family, name, p.module, acting)
    ]
    everyone = {**denoisers, **others}
    tokens = None if pruning is None else Tokens(pruning, generation, everyone)
    layers = tokens.with_layers(layers) if tokens is not None else layers
    activity, complete = Activity(acting, generation.record), False
    try:
        with ExitStack() as stack:
            if acting or changes or tokens is not None:
                calls, opened = generation.evaluator.cached_calls, generation.plan.opened
                attachment = Attachment(
                    activity, family, everyone, layers, changes, calls, opened, tokens
                )
                attachment.extend(generation)
                stack.enter_context(attachment.installed())
                generation.evaluator.middleware.append(attachment.around)
                stack.callback(generation.evaluator.middleware.remove, attachment.around)
            yield
        complete = True
    finally:
        activity.finish(selected, complete)
        if tokens is not None:
            tokens.finish(complete)


def layers_for(
    family: Family,
    name: str,
    module: Any,
    techniques: Sequence[AttentionTechnique],
    changes: Sequence[AttentionTechnique] = (),
) -> list[Layer]:
    """Layers of one denoiser at which ``techniques`` and the ``changes`` of passes act."""
    layers = {layer.name: layer for layer in layers_of(family, name, module)} if techniques else {}
    for layer in map_layers(family, name, module) if changes else ():
        if any(change.selects(layer.site) for change in changes):
            layers.setdefault(layer.name, layer)
    return list(layers.values())


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
    """Attention techniques, and changes of passes, at the layers of denoisers."""

    def __init__(
        self,
        activity: Activity[AttentionTechnique],
        family: Family,
        denoisers: dict[str, Any],
        layers: Sequence[Layer],
        changes: Sequence[AttentionTechnique] = (),
        calls: CachedCalls | None = None,
        opened: bool = True,
        tokens: Tokens | None = None,
    ) -> None:
        self.activity, self.family, self.denoisers = activity, family, denoisers
        self.tokens = tokens
        techniques = activity.techniques
        self.layers = [
            layer
            for layer in layers
            if layer.chain(techniques)
            or any(change.selects(layer.site) for change in changes)
            or (tokens is not None and layer.kind != "cross")
        ]
        self.running = RunningCall(opaque=any(map(is_compiled, denoisers.values())))
        self.kernels = Kernels(activity.record.notes)
        self.caches = Caches(denoisers, calls or CachedCalls())
        self.usage = Usage()
        if self.layers:
            joint = any(layer.kind == "joint" for layer in layers)
            longer = joint and any(t.everywhere for t in techniques)
            two_calls = opened and family.mode == "sequential"
            self.caches.refuse(longer and two_calls, bool(changes))
        # technique -> what it adds around each call
        self.extensions: dict[AttentionTechnique, CallExtension] = {}
        # denoiser -> the image in tokens, the same in every call
        self.grids: dict[str, Grid] = {}

    def extend(self, generation: Generation) -> None:
        """Ask the techniques what they add around each call of a generation."""
        for technique in self.activity.techniques:
            extension = technique.extension(generation)
            if extension is not None:
                self.extensions[technique] = extension

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in place, put back on leaving, also after an exception."""
        handlers, notes = self.running.handlers, self.activity.record.notes
        for layer in self.layers:
            handlers[layer.module] = ("__call__", functools.partial(self._attend, layer))
        for extension in self.extensions.values():
            handlers.update(extension.handlers(self.running, self.denoisers))
        if self.tokens is not None:
            handlers.update(self.tokens.handlers(self.running.passage))
        with ExitStack() as stack:
            notes += [note for note in to_native(self.layers, stack) if note not in notes]
            stack.callback(self._tell)
            stack.enter_context(intercepted(handlers, self.running.opaque))
            checkpoints.remember(self.denoisers.values(), self._snapshot, stack)
            yield

    def _tell(self) -> None:
        """What ran goes into the report."""
        record = self.activity.record
        record.notes += [note for note in self.usage.notes() if note not in record.notes]
        record.backends = {name: len(layers) for name, layers in self.usage.layers.items()}

    def _snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        return functools.partial(self.running.at, self.running.view)

    def around(self, inner: Denoise) -> Denoise:
        """The denoiser with the techniques around it."""

        def denoise(call: DenoiserCall, arguments: dict[str, Any]) -> Any:
            active, change = self.activity.active(call.step), call.passes[0].attention
            prompt = text_length(self.family, arguments)
            view = CallView(call.denoiser, active, call.conditioned, prompt, change=change)
            extensions = [self.extensions[t] for t in active if t in self.extensions]
            for extension in extensions:
                call, arguments, view = extension.open(call, arguments, view)
            if active or change is not None:
                module = self.denoisers[call.denoiser]
                view = replace(view, row_parts=row_parts(self.family, module, arguments))
            if change is not None:
                self.activity.acts(change, call.step)
                view = replace(view, grid=self._grid(call, arguments) if change.spatial else None)
            self.caches.empty_stale(view)
            passage = None if self.tokens is None else self.tokens.open(call, arguments)
            if passage is not None:
                arguments, view = passage.arguments(arguments), replace(view, passage=passage)
            with self.running.at(view):
                output = inner(call, arguments)
            if self.tokens is not None and passage is not None:
                self.tokens.close(passage, call)
            for extension in reversed(extensions):
                output = extension.close(output, view)
            return output

        return denoise

    def _grid(self, call: DenoiserCall, arguments: dict[str, Any]) -> Grid:
        name = call.denoiser
        if name not in self.grids:
            self.grids[name] = self.family.grid(unwrapped(self.denoisers[name]), arguments)
        return self.grids[name]

    def _attend(
        self,
        layer: Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One layer was called: its own processor runs, and the techniques around its attention."""
        view = self.running.view
        techniques = [] if view is None else layer.chain(view.active, view.change)
        passage = None if view is None or layer.kind == "cross" else view.passage
        passage = passage if passage is not None and passage.at_layers else None
        if view is None or not (techniques or passage):
            return original(*args, **kwargs)

        def attend(call: Arguments, dense: Dense) -> Tensor:
            call = call if passage is None else passage.widened(layer, call)
            if not techniques:
                return dense(call.q, call.k, call.v, call.mask)
            site = site_of(layer, view, call.q, call.k)
            for technique in techniques:
                if technique.selects(site):
                    self.activity.note(technique, layer.denoiser, layer.name)
            call = replace(call, mask=_one_head(call.mask, layer))
            return start(call, dense, site, techniques, self.kernels)

        kwargs = kwargs if passage is None else passage.layer_arguments(kwargs)
        seats = seats_of(layer.module)
        with Intercepted(layer.call, seats, layer.name, self.usage, attend) as mode:
            output = original(*args, **kwargs)
        if mode.calls <= layer.call and not self.caches.active[layer.denoiser]:
            raise UnsupportedModel(
                f"{type(layer.module.processor).__name__} at {layer.name!r} made {mode.calls} "
                "calls of attention that diffalign can follow where "
                f"{layer.call + 1} was expected, so {_name(techniques, self.tokens)} cannot act "
                "there. Set a processor of diffusers."
            )
        return output


def _one_head(mask: Tensor | None, layer: Layer) -> Tensor | None:
    """A mask [B, 1, ...] where diffusers has repeated it for all heads: kernels want to see that
    it is one."""
    theirs = type(layer.module.processor).__module__.startswith("diffusers.")
    return mask[:, :1] if mask is not None and mask.ndim == 4 and theirs else mask


def _name(techniques: Sequence[AttentionTechnique], tokens: Tokens | None) -> str:
    """The technique that a layer stops."""
    first: object = techniques[0] if techniques or tokens is None else tokens.technique
    return type(first).__name__
