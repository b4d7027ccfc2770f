"""Class swaps: override one method of one live object, and put its class back exactly.

A swapped object gets a same-named subclass of its class, created once per (class, method) and
cached, so that a compiled model sees at most two classes in its life. The override asks a
``ContextVar`` for its handler and passes straight through without one: another thread, or another
pipeline that shares the module, never notices. Copies and pickles are of the original class.

Other packages replace methods of classes too, and may do it while a class of ours stands in: what
they set on ``obj.__class__`` then goes to the original class, and stays there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_CLASSES: dict[tuple[type, str, bool], Any] = {}
_COUNTS: dict[int, int] = {}
_LOCK = threading.RLock()
_NONE: Mapping[int, Handler] = MappingProxyType({})
_HANDLERS: ContextVar[Mapping[int, Handler]] = ContextVar("diffalign_handlers", default=_NONE)
# objects whose handler is running the original method
_BENEATH: ContextVar[frozenset[int]] = ContextVar("diffalign_beneath", default=frozenset())
# what somebody read from a class of ours -> the method of the original class that it stands for
_READ: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


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


@functools.cache
def _as_read(method: Any, find: Callable[[Any], Handler | None]) -> Any:
    """What reading ``obj.__class__.method`` gives: ``method``, asking for a handler first.

    Whoever reads it may put it into a method of his own and that into the class. Called from there,
    with the handler running already or after the swap, it is the method alone.
    """

    def find_outermost(obj: Any) -> Handler | None:
        plain = id(obj) in _BENEATH.get() or original_class(obj) is type(obj)
        return None if plain else find(obj)

    override = _override(lambda: method, find_outermost)
    _READ[override] = method
    return override


@functools.cache
def _standing_in(meta: type) -> type:
    """The class of our subclasses of pipelines and schedulers: attributes that others read from it
    or set on it are those of the original class."""

    class StandIn(meta):  # type: ignore[misc, valid-type]
        def __getattribute__(cls, name: str) -> Any:
            method, find = type.__getattribute__(cls, "_diffalign_override")
            if name != method:
                return super().__getattribute__(name)
            return _as_read(getattr(type.__getattribute__(cls, "_diffalign_base"), name), find)

        def __setattr__(cls, name: str, value: Any) -> None:
            with suppress(TypeError):  # it cannot be a key
                value = _READ.get(value, value)
            setattr(type.__getattribute__(cls, "_diffalign_base"), name, value)

        def __delattr__(cls, name: str) -> None:
            delattr(type.__getattribute__(cls, "_diffalign_base"), name)

    return StandIn


@contextmanager
def beneath(obj: Any) -> Iterator[None]:
    """Within the block the handler of ``obj`` runs the original method."""
    token = _BENEATH.set(_BENEATH.get() | {id(obj)})
    try:
        yield
    finally:
        _BENEATH.reset(token)


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
            module = issubclass(base, torch.nn.Module)  # a compiler looks into those
            swapped: Any = (type(base) if module else _standing_in(type(base)))(
                base.__name__,
                (base,),
                {
                    **names,
                    method: override,
                    "__reduce_ex__": reduce,
                    "_diffalign_base": base,
                    "_diffalign_override": (method, find),
                },
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
    token, below = _HANDLERS.set({}), _BENEATH.set(frozenset())
    try:
        return original(*args, **kwargs)
    finally:
        _BENEATH.reset(below)
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
