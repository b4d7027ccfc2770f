"""Class swaps: override one method of one live object, and put its class back exactly.

A swapped object gets a same-named subclass of its class, created once per (class, method) and
cached, so that a compiled model sees at most two classes in its life. The override asks a
``ContextVar`` for its handler and passes straight through without one: another thread, or another
pipeline that shares the module, never notices. Copies and pickles are of the original class.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_CLASSES: dict[tuple[type, str, bool], Any] = {}
_COUNTS: dict[int, int] = {}
_LOCK = threading.RLock()
_NONE: Mapping[int, Handler] = MappingProxyType({})
_HANDLERS: ContextVar[Mapping[int, Handler]] = ContextVar("diffalign_handlers", default=_NONE)


def _override(original: Callable[[], Any], find: Callable[[Any], Handler | None]) -> Any:
    """A method that asks ``find(self)`` for a handler first.

    ``original``: looks the method up at each call, since others replace methods of classes too.
    People call ``pipe.__call__.__wrapped__(pipe, ...)`` to get past a decorator such as
    ``torch.no_grad``: that form asks for a handler as well.
    """
    inner = original()

    @functools.wraps(inner)
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = find(self)
        if handler is None:
            return original()(self, *args, **kwargs)
        return handler(functools.partial(original(), self), args, kwargs)

    if hasattr(inner, "__wrapped__"):
        override.__wrapped__ = _override(lambda: original().__wrapped__, find)
    return override


def _rebuild(cls: type) -> Any:
    return object.__new__(cls)


def subclass(
    base: type, method: str, find: Callable[[Any], Handler | None], opaque: bool = False
) -> type:
    """The cached subclass of ``base`` whose ``method`` first asks ``find(self)`` for a handler
    ``(original, args, kwargs) -> result``.

    ``opaque``: a compiler does not look into the method, so that handlers may differ from call to
    call without a new graph.
    """
    with _LOCK:
        if (base, method, opaque) not in _CLASSES:
            override = _override(functools.partial(getattr, base, method), find)

            def reduce(self: Any, protocol: Any) -> Any:
                parts: Any = super(swapped, self).__reduce_ex__(protocol)
                return (_rebuild, (base,), *parts[2:])

            if opaque:
                reason = (
                    "a technique of diffalign acts here; compile the model without fullgraph=True"
                )
                disable: Any = torch.compiler.disable
                override = disable(override, reason=reason)
            names = {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
            }
            swapped: Any = type(base)(
                base.__name__,
                (base,),
                {**names, method: override, "__reduce_ex__": reduce, "_diffalign_base": base},
            )
            _CLASSES[base, method, opaque] = swapped
        swapped_class: type = _CLASSES[base, method, opaque]
        return swapped_class


def original_class(obj: Any) -> type:
    """The class of ``obj`` without any swap of ours."""
    cls = type(obj)
    base: type = cls.__dict__.get("_diffalign_base", cls)
    return base


def unwrapped(module: Any) -> Any:
    """The model inside a compiled module, a PeftModel or a data-parallel wrapper; else itself."""
    parts = vars(module).get("_modules", {})
    for name in ("_orig_mod", "module", "_fsdp_wrapped_module"):
        if name in parts:
            return unwrapped(parts[name])
    if "base_model" in parts and hasattr(parts["base_model"], "model"):  # PEFT
        return unwrapped(parts["base_model"].model)
    return module


def acquire(
    obj: Any, method: str, find: Callable[[Any], Handler | None], opaque: bool = False
) -> None:
    """Swap the class of ``obj``; counted, so that holders may overlap."""
    with _LOCK:
        count = _COUNTS.get(id(obj), 0)
        if count == 0:
            object.__setattr__(obj, "__class__", subclass(type(obj), method, find, opaque))
        _COUNTS[id(obj)] = count + 1


def release(obj: Any) -> None:
    """Undo one ``acquire``; the last one restores the class, unless somebody else has changed it
    since."""
    with _LOCK:
        _COUNTS[id(obj)] -= 1
        if _COUNTS[id(obj)] == 0:
            del _COUNTS[id(obj)]
            base = type(obj).__dict__.get("_diffalign_base")
            if base is not None:
                object.__setattr__(obj, "__class__", base)


def handler_of(obj: Any) -> Handler | None:
    """The handler that calls of ``obj`` go to in this context, None where they are plain."""
    return _HANDLERS.get().get(id(obj))


def _shadowed(obj: Any, shadow: Callable[..., Any]) -> Callable[..., Any]:
    """A method that was set on the object itself, asking for a handler first."""

    @functools.wraps(shadow)
    def call(*args: Any, **kwargs: Any) -> Any:
        handler = handler_of(obj)
        return shadow(*args, **kwargs) if handler is None else handler(shadow, args, kwargs)

    return call


def in_place(handlers: Mapping[Any, tuple[str, Handler]]) -> bool:
    """Whether these very handlers are active in this context."""
    active = _HANDLERS.get()
    return all(active.get(id(obj)) is handler for obj, (_, handler) in handlers.items())


def outside(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A handler: the call runs as if nothing were intercepted, so that what a user's callback runs
    is its own."""
    token = _HANDLERS.set({})
    try:
        return original(*args, **kwargs)
    finally:
        _HANDLERS.reset(token)


@contextmanager
def intercepted(
    handlers: Mapping[Any, tuple[str, Handler]], opaque: bool = False
) -> Iterator[None]:
    """Within the block and this context, calls of ``method`` on each object go to its handler."""
    taken: list[Any] = []
    shadows: list[tuple[Any, str, Any]] = []
    token = _HANDLERS.set(
        {**_HANDLERS.get(), **{id(obj): handler for obj, (_, handler) in handlers.items()}}
    )
    try:
        for obj, (method, _) in handlers.items():
            acquire(obj, method, handler_of, opaque)
            taken.append(obj)
            shadow = None if method == "__call__" else vars(obj).get(method)
            if shadow is not None:  # set on the object by somebody, so the class is not asked
                shadows.append((obj, method, shadow))
                vars(obj)[method] = _shadowed(obj, shadow)
        yield
    finally:
        _HANDLERS.reset(token)
        for obj, method, shadow in reversed(shadows):
            vars(obj)[method] = shadow
        for obj in reversed(taken):
            release(obj)
