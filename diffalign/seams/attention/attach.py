"""Attention techniques on one generation: what is installed, what each layer sees, and what is
counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from diffalign.core import StepInfo, UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.core.registry import name_of
from diffalign.core.window import never_acted
from diffalign.seams.attention.base import AttentionTechnique, Stream
from diffalign.seams.attention.intercept import Intercepted, start
from diffalign.seams.attention.native import to_native
from diffalign.seams.attention.sites import Frame, Layer, layers_of, site_of, spans_of, text_length
from diffalign.seams.denoiser.cache import empty_cache
from diffalign.seams.denoiser.call import Denoise, DenoiserCall
from diffalign.seams.denoiser.tap import Generation
from diffalign.seams.plan import context_of
from diffalign.seams.swap import Handler, in_place, intercepted

# feature caches that reuse what an attention technique changes between calls
REFUSED_CACHES = {
    "FasterCacheConfig": "it skips the unconditional rows inside the model",
    "TextKVCacheConfig": "it keeps text keys from call to call",
}


class Attachment:
    """One generation's attention techniques.

    ``frame``: the denoiser call that is running, None between calls.
    """

    def __init__(self, group: Sequence[AttentionTechnique], run: Generation) -> None:
        self.run = run
        self.group = tuple(sorted((t for t in group if not t.off), key=lambda t: t.order))
        self.frame: Frame | None = None
        self.acting: set[tuple[str, str, str]] = set()
        self.steps: dict[str, set[int]] = {}
        self.always: set[AttentionTechnique] | None = None
        self.chosen: dict[Any, Any] = {}
        self.cached: dict[str, bool] = {}
        self.last: dict[str, Any] = {}
        self.denoisers = {
            name: m
            for name in run.family.denoisers
            if (m := getattr(run.pipe, name, None)) is not None
        }
        for technique in group:
            reason = technique.refuses(context_of(run.pipe, run.family))
            if reason is not None:
                raise UnsupportedModel(
                    f"{type(technique).__name__} cannot act on {type(run.pipe).__name__}: {reason}."
                )
        self.layers = [
            layer
            for name, m in self.denoisers.items()
            for layer in layers_of(run.family, name, getattr(m, "_orig_mod", m))
        ]
        self.selected = {type(t).__name__: self._select(t) for t in group}
        self.compiled = any(map(_is_compiled, self.denoisers.values()))
        self.streams: dict[AttentionTechnique, Stream] = {}
        self.handlers: dict[Any, tuple[str, Handler]] = {}

    def _select(self, technique: AttentionTechnique) -> int:
        count = sum(technique.selects(layer.site) for layer in self.layers)
        if count == 0:
            near = nearest(
                " ".join(getattr(technique, "layers", None) or ()),
                [layer.name for layer in self.layers],
            )
            raise UnsupportedModel(
                f"{type(technique).__name__} selects no attention layer that sees text. Such "
                f"layers: {near}."
            )
        return count

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in place, put back on leaving, also after an exception."""
        if not self.group:
            yield
            return
        with ExitStack() as stack:
            for name, module in self.denoisers.items():
                self._check_cache(name, module)
            for technique in self.group:
                stream = technique.stream(self.run)
                if stream is not None:
                    self.streams[technique] = stream
            used = [layer for layer in self.layers if self._chain(layer, self.group)]
            self.run.record.notes += to_native(used, stack)
            for layer in used:
                self.handlers[layer.module] = ("__call__", functools.partial(self._layer, layer))
            for stream in self.streams.values():
                self.handlers.update(stream.handlers(self))
            stack.enter_context(intercepted(self.handlers, self.compiled))
            self._keep_checkpoints(stack)
            self.run.evaluator.middleware.append(self._middleware)
            stack.callback(self.run.evaluator.middleware.remove, self._middleware)
            yield

    def counts(self) -> dict[str, tuple[int, int]]:
        """Technique -> (layers where it acted, layers selected)."""
        return {
            name: (sum(name == acted for acted, _, _ in self.acting), count)
            for name, count in self.selected.items()
        }

    def say_what_never_acted(self) -> None:
        """A note and a warning about each technique whose window held no step of the run."""
        for technique in self.group if self.run.record.sigma else ():
            name = type(technique).__name__
            if not any(name == acted for acted, _, _ in self.acting):
                self.run.record.notes.append(never_acted(name, self.run.record.sigma))

    def _too_late(self, technique: AttentionTechnique, first: StepInfo) -> bool:
        """Whether the model's default window ends before the run begins, as in image-to-image: then
        the technique acts at every step."""
        options = self.run.record.resolved.get(name_of(technique), {})
        window, source = options.get("sigma", (None, ""))
        if not source or first.sigma >= window[0]:
            return False
        options["sigma"] = (
            (0.0, math.inf),
            f"the run begins at {first.sigma:.3g}, below {window[0]:g} of {source}",
        )
        return True

    def kernel(self, op: str, key: Any, make: Callable[[], Any]) -> Any:
        """The callable of a ``Choice``, made once per key; its reason goes into the report."""
        if (op, key) not in self.chosen:
            choice = make()
            self.chosen[op, key] = choice.call
            note = f"{op} kernel: {choice.reason}"
            said = note.partition(" (")[0]  # the reason without the sizes of this layer
            if not any(other.startswith(said) for other in self.run.record.notes):
                self.run.record.notes.append(note)
        return self.chosen[op, key]

    # -- one denoiser call

    def _middleware(self, inner: Denoise) -> Denoise:
        def denoise(evaluation: DenoiserCall, kwargs: dict[str, Any]) -> Any:
            if self.always is None:
                self.always = {t for t in self.group if self._too_late(t, evaluation.step)}
            active = tuple(t for t in self.group if t in self.always or t.active(evaluation.step))
            for technique in active:
                self.steps.setdefault(type(technique).__name__, set()).add(evaluation.step.index)
            name, module = evaluation.denoiser, self.denoisers[evaluation.denoiser]
            frame = Frame(
                name, active, evaluation.conditioned, text_length(self.run.family, kwargs)
            )
            opened = []
            for technique in active:
                if technique in self.streams:
                    evaluation, kwargs, frame = self.streams[technique].open(
                        evaluation, kwargs, frame
                    )
                    opened.append(self.streams[technique])
            if active:
                frame = replace(frame, spans=spans_of(self.run.family, module, kwargs))
            self._reset_cache(name, module, frame)
            with self._at(frame):
                output = inner(evaluation, kwargs)
            for stream in reversed(opened):
                output = stream.close(output, frame)
            return output

        return denoise

    def _chain(
        self, layer: Layer, techniques: Sequence[AttentionTechnique]
    ) -> list[AttentionTechnique]:
        return [t for t in techniques if t.everywhere or t.selects(layer.site)]

    def _layer(
        self,
        layer: Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        frame = self.frame
        chain = [] if frame is None else self._chain(layer, frame.active)
        if frame is None or not chain:
            return original(*args, **kwargs)

        def attend(q: Any, k: Any, v: Any, mask: Any, options: dict[str, Any]) -> Any:
            site = site_of(layer, frame, q, k)
            if (
                mask is not None
                and mask.ndim == 4
                and type(layer.module.processor).__module__.startswith("diffusers.")
            ):
                mask = mask[
                    :, :1
                ]  # diffusers repeats one mask for all heads; kernels want to see that it is one
            self.acting.update(
                (type(t).__name__, layer.denoiser, layer.name) for t in chain if t.selects(site)
            )
            return start(q, k, v, mask, options, site, chain, self.kernel)

        with Intercepted(layer.call, attend) as mode:
            output = original(*args, **kwargs)
        if mode.calls <= layer.call and not self.cached[layer.denoiser]:
            raise UnsupportedModel(
                f"{type(layer.module.processor).__name__} at {layer.name!r} made {mode.calls} "
                "calls of scaled_dot_product_attention where "
                f"{layer.call + 1} was expected, so {type(chain[0]).__name__} cannot act there. "
                "Set a processor of diffusers."
            )
        return output

    # -- caches and checkpoints

    def _check_cache(self, name: str, module: Any) -> None:
        self.cached[name] = bool(getattr(module, "is_cache_enabled", False))
        config = type(getattr(module, "_cache_config", None)).__name__
        if config in REFUSED_CACHES:
            raise UnsupportedModel(
                f"{config} cannot be combined with attention techniques: "
                f"{REFUSED_CACHES[config]}. Disable the cache."
            )
        longer = any(t.everywhere for t in self.group) and any(
            layer.kind == "joint" for layer in self.layers
        )
        if (
            config == "PyramidAttentionBroadcastConfig"
            and longer
            and self.run.family.mode == "sequential"
        ):
            raise UnsupportedModel(
                f"{config} cannot be combined with NAG here: it hands attention outputs of one "
                "branch to the other, which has another text "
                "length. Disable the cache."
            )

    def _reset_cache(self, name: str, module: Any, frame: Frame) -> None:
        """A cache made with other techniques, or other shapes, is of no use."""
        shape = (
            (frame.active, frame.negative > 0, bool(frame.twins))
            if any(frame.conditioned)
            else None
        )
        if shape is not None and self.cached[name] and self.last.setdefault(name, shape) != shape:
            empty_cache(module)
            self.last[name] = shape

    def _keep_checkpoints(self, stack: ExitStack) -> None:
        """Blocks recomputed in a backward pass, maybe in another thread and after the run, must see
        their techniques again."""
        for module in (m for denoiser in self.denoisers.values() for m in denoiser.modules()):
            held = vars(module).get("_gradient_checkpointing_func")
            if held is not None and getattr(module, "gradient_checkpointing", False):
                ours = functools.partial(self._checkpoint, held)
                module._gradient_checkpointing_func = ours
                stack.callback(_restore, module, "_gradient_checkpointing_func", ours, held)

    def _checkpoint(
        self, checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        frame = self.frame

        def again(*given: Any, **named: Any) -> Any:
            with self._at(frame):
                return block(*given, **named)

        return checkpoint(again, *args, **kwargs)

    @contextmanager
    def _at(self, frame: Frame | None) -> Iterator[None]:
        """Within one denoiser call, or a part of it that is recomputed, also in another thread or
        after the run."""
        before, self.frame = self.frame, frame
        try:
            with (
                nullcontext()
                if in_place(self.handlers)
                else intercepted(self.handlers, self.compiled)
            ):
                yield
        finally:
            self.frame = before


def _is_compiled(denoiser: Any) -> bool:
    """In whole or in part."""
    return hasattr(denoiser, "_orig_mod") or any(
        getattr(m, "_compiled_call_impl", None) is not None for m in denoiser.modules()
    )


def _restore(module: nn.Module, name: str, ours: Any, held: Any) -> None:
    if vars(module).get(name) is ours:
        setattr(module, name, held)


@contextmanager
def attach(group: Sequence[AttentionTechnique], run: Generation) -> Iterator[None]:
    """``group`` acts on every denoiser call of ``run`` until the context is left.

    Raises ``UnsupportedModel`` where it cannot.
    """
    attachment = Attachment(group, run)
    try:
        with attachment.installed():
            yield
        attachment.say_what_never_acted()
    finally:
        run.record.layers.update(attachment.counts())
        run.record.acted.update(
            {type(t).__name__: len(attachment.steps.get(type(t).__name__, ())) for t in group}
        )
