"""Sessions: techniques on one pipeline object, for a ``with`` block or until ``disable``; off
leaves nothing behind."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

from diffalign.core import Context, Meter, SessionError, UnsupportedModel
from diffalign.core.errors import warn_once
from diffalign.core.registry import name_of, to_config
from diffalign.families.family import Family
from diffalign.families.table import family_of
from diffalign.seams import swap
from diffalign.seams.denoiser.branch_log import BranchLog
from diffalign.seams.denoiser.tap import Run
from diffalign.seams.guiders_in import as_technique
from diffalign.seams.report import Report

_STACKS: weakref.WeakKeyDictionary[Any, list[Session]] = weakref.WeakKeyDictionary()
_BUSY: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


class Session:
    """Techniques that act on one pipeline object. ``apply`` and ``enable`` make it; it can be
    entered once.

    ``report()``: what the last generation did and cost. ``config()``: the techniques as JSON data.
    ``cancel()``: stop at the next step.
    """

    def __init__(self, pipe: Any, techniques: Sequence[Any]) -> None:
        self.family, self.inherited = family_of(swap.original_class(pipe))
        techniques = [as_technique(given) for given in techniques]
        for technique in techniques:
            if not hasattr(technique, "kind") or isinstance(technique, type):
                raise TypeError(
                    f"apply takes techniques like da.CFG(5.0); got {technique!r}. `diffalign "
                    "methods` lists them."
                )
        self._pipe = weakref.ref(pipe)
        self.techniques = tuple(techniques)
        self.lasting = False
        self._run: Run | None = None
        self._log: BranchLog | None = None
        self._report = Report(pipeline=swap.original_class(pipe).__name__)
        _check_together(
            [*(t for s in _STACKS.get(pipe, []) for t in s.techniques), *self.techniques]
        )

    def __enter__(self) -> Self:
        pipe = self._pipe()
        if pipe is None:
            raise SessionError("The pipeline of this session no longer exists.")
        stack = _STACKS.setdefault(pipe, [])
        if self in stack:
            raise SessionError("This session is already active; make a new one with apply(...).")
        _check_together([*(t for s in stack for t in s.techniques), *self.techniques])
        swap.acquire(pipe, "__call__", _handler)
        stack.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the techniques off the pipeline.

        Sessions close in reverse order; closing twice is harmless.
        """
        pipe = self._pipe()
        stack = _STACKS.get(pipe, []) if pipe is not None else []
        if self not in stack:
            return
        if stack[-1] is not self:
            raise SessionError(
                "A session opened later is still active on this pipeline; close that one first."
            )
        stack.pop()
        swap.release(pipe)
        if not stack and pipe is not None:
            del _STACKS[pipe]

    def report(self) -> Report:
        """The last finished generation; an empty report before the first."""
        if self._log is not None:
            self._report.scale, self._report.orthogonal, self._report.cosine = self._log.columns(
                self._report.steps
            )
            self._log = None
        return self._report

    def config(self) -> dict[str, Any]:
        """The techniques and their options as JSON data; ``techniques_of`` reads it back."""
        from diffalign import __version__

        return {"diffalign": __version__, "techniques": [to_config(t) for t in self.techniques]}

    def cancel(self) -> None:
        """Stop the running generation at its next denoiser call with ``Cancelled``; without one,
        nothing happens."""
        if self._run is not None:
            self._run.cancelled = True


def apply(pipe: Any, *techniques: Any) -> Session:
    """Techniques for a ``with`` block: ``with da.apply(pipe, da.AdaptiveGuidance()) as session:
    pipe(...)``.

    Raises ``UnsupportedModel`` when the pipeline or a technique on it is not supported,
    ``ValueError`` for techniques that conflict. An inner ``apply`` on the same pipeline adds its
    techniques to the outer ones.
    """
    return Session(pipe, techniques)


def enable(pipe: Any, *techniques: Any) -> Session:
    """Techniques until ``disable(pipe)``.

    Raises like ``apply``, and ``SessionError`` when techniques are already active.
    """
    family_of(swap.original_class(pipe))
    if _STACKS.get(pipe):
        raise SessionError(
            "Techniques are already active on this pipeline; call disable(pipe) first, or add "
            "some with apply(...)."
        )
    session = Session(pipe, techniques)
    session.lasting = True
    return session.__enter__()


def disable(pipe: Any) -> None:
    """Undo ``enable``; without one, nothing happens. Inside an ``apply`` block it raises
    ``SessionError``."""
    stack = _STACKS.get(pipe, [])
    if any(not session.lasting for session in stack):
        raise SessionError("disable(pipe) inside an apply block: leave the block instead.")
    for session in list(stack):
        session.close()


def active(pipe: Any) -> tuple[Any, ...]:
    """The techniques now active on ``pipe``, outermost first."""
    return tuple(t for session in _STACKS.get(pipe, []) for t in session.techniques)


def _check_together(techniques: Sequence[Any]) -> None:
    """Two guidances, or one class twice, cannot act together."""
    seen: dict[type, Any] = {}
    guidance = None
    for technique in techniques:
        if type(technique) in seen:
            raise ValueError(
                f"{type(technique).__name__} is given twice; each technique acts once. Keep one "
                "of them."
            )
        seen[type(technique)] = technique
        if technique.kind == "guidance":
            if guidance is not None:
                raise ValueError(
                    f"{guidance} and {type(technique).__name__} are both guidances; only one can "
                    "form the prediction."
                )
            guidance = type(technique).__name__


def _handler(pipe: Any) -> swap.Handler | None:
    stack = _STACKS.get(pipe)
    return functools.partial(_generate, pipe, stack) if stack else None


def _generate(
    pipe: Any,
    stack: list[Session],
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    lock = _BUSY.setdefault(pipe, threading.Lock())
    if not lock.acquire(blocking=False):
        raise SessionError(
            "This pipeline is already generating in a session; run one generation at a time per "
            "pipeline object."
        )
    try:
        family = stack[0].family
        techniques = [t for session in stack for t in session.techniques]
        plan = _Plan(pipe, family, techniques, original, args, kwargs)
        run = Run(pipe, family, plan.guidances, plan.own, plan.opened, family.placeholder)
        run.call, run.meter, run.resolved = plan.value, plan.meter, plan.resolved
        for session in stack:
            session._run = run
        with (
            _tapped(pipe, family, run, plan.techniques, not plan.guess_mode),
            _callbacks(plan.arguments),
        ):
            result = original(**plan.arguments)
        report = run.report()
        for session in stack:
            session._report, session._log = report, run.log
        return result
    finally:
        for session in stack:
            session._run = None
        lock.release()


@contextmanager
def _tapped(
    pipe: Any, family: Family, run: Run, techniques: Sequence[Any], accompanied: bool
) -> Iterator[None]:
    """Taps on the denoisers and the scheduler, and attached techniques, for one generation."""
    modules = {
        name: module
        for name in family.denoisers
        if (module := getattr(pipe, name, None)) is not None
    }
    handlers: dict[Any, tuple[str, swap.Handler]] = {
        module: ("__call__", functools.partial(run.denoise, name, module))
        for name, module in modules.items()
    }
    if accompanied:
        for name in family.companions:
            module = getattr(pipe, name, None)
            if module is not None:
                handlers[module] = ("__call__", functools.partial(run.accompany, module))
    handlers[pipe.scheduler] = ("step", run.scheduler_step)
    announced = pipe.__dict__.pop("_num_timesteps", None)
    try:
        with ExitStack() as stack:
            stack.enter_context(swap.intercepted(handlers))
            _enter_attachments(run, techniques, stack)
            yield
    finally:
        if announced is not None:
            pipe.__dict__.setdefault("_num_timesteps", announced)


@contextmanager
def _callbacks(arguments: dict[str, Any]) -> Iterator[None]:
    """The user's callbacks run outside the session: another pipeline that shares the denoiser may
    generate there."""
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    objects: dict[Any, tuple[str, swap.Handler]] = {}
    for name in ("callback_on_step_end", "callback"):
        callback = arguments.get(name)
        if isinstance(
            callback, PipelineCallback | MultiPipelineCallbacks
        ):  # pipelines look at their class
            objects[callback] = ("__call__", swap.outside)
        elif callback is not None:
            arguments[name] = functools.partial(_outside, callback)
    with swap.intercepted(objects):
        yield


def _outside(callback: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return swap.outside(callback, args, kwargs)


def _enter_attachments(run: Run, techniques: Sequence[Any], stack: ExitStack) -> None:
    """Install attention and block techniques for this run, by kind and never by the user's order."""
    for kind in ("attention", "block"):
        group = [t for t in techniques if t.kind == kind]
        if group:
            stack.enter_context(type(group[0]).attach(group, run))


@functools.cache
def _signature(cls: type) -> tuple[inspect.Signature, dict[str, Any], str]:
    """Signature of a pipeline's call, its defaults, and the name of its ``**`` argument, empty when
    it has none."""
    signature = inspect.signature(cls.__call__)
    defaults = {
        n: p.default
        for n, p in signature.parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    return (
        signature,
        defaults,
        next(
            (n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD),
            "",
        ),
    )


class _Plan:
    """The call's arguments as the pipeline will get them, and the techniques with every option
    resolved."""

    def __init__(
        self,
        pipe: Any,
        family: Family,
        techniques: Sequence[Any],
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        signature, defaults, extra = _signature(swap.original_class(pipe))
        if args or not kwargs.keys() <= defaults.keys():
            bound = signature.bind(pipe, *args, **kwargs)
            bound.arguments.pop("self")
            given = dict(bound.arguments)
            given.update(given.pop(extra, {}))
        else:  # the usual call: by name, so there is nothing to bind
            given = dict(kwargs)
        value = defaults | given
        self.arguments, self.value, self.meter = given, value, Meter()
        self.resolved: dict[str, dict[str, tuple[Any, str]]] = {}
        guidance = next((t for t in techniques if t.kind == "guidance"), None)
        self.reads_negative = any(getattr(t, "reads_negative", False) for t in techniques)
        refusals = [
            (name, why)
            for name, why in family.refuses.items()
            if value.get(name) not in (None, 0, 0.0, False)
        ]
        if guidance is not None and refusals:
            raise UnsupportedModel(
                f"{refusals[0][0]}={value[refusals[0][0]]!r} cannot be combined with a guidance: "
                f"{refusals[0][1]}"
            )
        reason = family.check(pipe)
        if reason is not None and guidance is not None:
            raise UnsupportedModel(f"{swap.original_class(pipe).__name__}: {reason}")
        gate = family.gates[0] if family.gates else None
        native = [value.get(name) for name in family.gates]
        native = [native[0] if v is None else v for v in native]
        self.guess_mode = bool(
            value.get("guess_mode")
        )  # there the ControlNet runs the conditional rows alone by itself
        self.own = {own.name: value.get(own.name, own.neutral) for own in family.options}
        steps = value.get("timesteps") or value.get("sigmas")
        count = len(steps) if steps is not None else int(value.get("num_inference_steps") or 0)
        scheduler = pipe.scheduler
        self.guidances: dict[str, Any] = {}
        self.opened = (
            bool(native)
            and native[0] is not None
            and native[0] > family.on_above
            and reason is None
        )
        self.opened = self.opened and family.negative_given(pipe, value)
        self.techniques: list[Any] = []
        for i, name in enumerate(family.denoisers):
            scale = native[min(i, len(native) - 1)] if native else 1.0
            context = Context(
                pipeline=swap.original_class(pipe).__name__,
                family=family.name,
                denoiser=name,
                scheduler=swap.original_class(scheduler).__name__,
                scale=float(scale) + family.offset
                if scale is not None and scale > family.on_above
                else 1.0,
                scale_source="call"
                if family.gates and family.gates[min(i, len(family.gates) - 1)] in given
                else "pipeline default",
                steps=count,
                batch=0,
                flow="FlowMatch" in type(scheduler).__name__
                or getattr(scheduler.config, "prediction_type", "") == "flow_prediction",
                order=int(getattr(scheduler, "order", 1)),
                negative_prompt=_one_text(value.get("negative_prompt")),
                module=getattr(pipe, name, None),
                pipe=pipe,
                prompts=_texts(value),
                meter=self.meter,
            )
            if getattr(pipe, name, None) is None:
                continue
            for technique in techniques:
                if technique.kind != "guidance" and any(
                    type(t) is type(technique) for t in self.techniques
                ):
                    continue
                made, sources = _resolved(technique, context)
                suffix = (
                    f" [{name}]"
                    if technique.kind == "guidance"
                    and len(family.denoisers) > 1
                    and family.name == "wan"
                    and i
                    else ""
                )
                self.resolved[name_of(technique) + suffix] = {
                    f.name: (setting, sources.get(f.name, ""))
                    for f in fields(made)
                    if f.init
                    and not f.metadata.get("tensors")
                    and (setting := getattr(made, f.name)) is not None
                    if f.name not in ("start", "stop") or getattr(made, "sigma", None) is None
                }
                if technique.kind == "guidance":
                    self.guidances[name] = made
                    self._warn(technique, context, given)
                else:
                    self.techniques.append(made)
        if self.guidances and gate is not None:
            self._open(
                pipe,
                family,
                value,
                any(getattr(g, "needs_uncond", True) for g in self.guidances.values()),
            )

    def _warn(self, technique: Any, context: Context, given: dict[str, Any]) -> None:
        name, mine = type(technique).__name__, getattr(technique, "scale", None)
        if mine is not None and context.scale_source == "call" and mine != context.scale:
            warn_once(
                f"The call asks for guidance scale {context.scale:g} and {name} for {mine:g}; the "
                "technique's value is used."
            )
        negative = any(
            given.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds")
        )
        if (
            negative
            and not self.reads_negative
            and not getattr(self.guidances[context.denoiser], "needs_uncond", True)
        ):
            warn_once(
                f"The negative prompt has no effect: {name} at scale 1 never evaluates it. Use "
                "da.NAG or a scale above 1."
            )

    def _open(self, pipe: Any, family: Family, value: dict[str, Any], wanted: bool) -> None:
        """Switch the pipeline's guidance on with a dummy scale, or off, and take over what it does
        to the guided result."""
        gates = [
            gate
            for name, gate in zip(family.denoisers, family.gates)
            if getattr(pipe, name, None) is not None
        ]
        if wanted:
            missing = family.missing_negative(pipe, value)
            if missing is not None:
                raise UnsupportedModel(f"{swap.original_class(pipe).__name__}: {missing}")
            self.arguments.update(dict.fromkeys(gates, family.placeholder))
            if family.needs_negative and not family.negative_given(pipe, value):
                self.arguments["negative_prompt"] = (
                    "" if not isinstance(value.get("prompt"), list) else [""] * len(value["prompt"])
                )
        else:
            self.arguments.update(dict.fromkeys(gates, family.off))
        self.opened = wanted
        self.arguments.update(
            {own.name: own.neutral for own in family.options if own.name in value}
        )


def _resolved(technique: Any, context: Context) -> tuple[Any, dict[str, str]]:
    answer = technique.resolve(context)
    return answer if isinstance(answer, tuple) else (answer, context.sources)


def _texts(value: dict[str, Any]) -> tuple[str, ...]:
    """The prompt of each image, in the pipeline's order: a prompt's images stand together; empty
    where prompts are not given as text."""
    given = value.get("prompt")
    texts = [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []
    if not all(isinstance(text, str) for text in texts):
        return ()
    copies = int(value.get("num_images_per_prompt") or value.get("num_videos_per_prompt") or 1)
    return tuple(text for text in texts for _ in range(copies))


def _one_text(value: Any) -> str | None:
    """A prompt argument as one text: itself, or what every entry of a list says."""
    texts = set(value) if isinstance(value, list | tuple) else {value}
    only = texts.pop() if len(texts) == 1 else None
    return only if isinstance(only, str) else None


def techniques_of(config: dict[str, Any]) -> tuple[Any, ...]:
    """The techniques of ``Session.config()`` or of a saved PNG's settings.

    Raises ValueError where there are none, as in a sheet.
    """
    from diffalign.core.registry import from_config

    if "techniques" not in config:
        where = (
            "a contact sheet holds several: take one of its columns"
            if "columns" in config
            else "pass Session.config() or a PNG's settings"
        )
        raise ValueError(
            f"techniques_of needs settings with 'techniques'; got {sorted(config)}: {where}."
        )
    return tuple(from_config(item) for item in config["techniques"])


__all__ = ["Session", "active", "apply", "disable", "enable", "techniques_of"]
