"""Where processors look their attention function up, and how its tensors lie.

torch's own function is caught by a ``TorchFunctionMode`` (``intercept.py``). Backends of diffusers'
dispatcher and xformers' function are plain Python: while a layer runs, the entry under which they
are looked up is one that asks for a watcher first. The watcher is found through a ``ContextVar``,
so every other thread passes straight through.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.core import UnsupportedModel

# torch's own attention, also where somebody has put another function in its place
SDPA = torch._C._nn.scaled_dot_product_attention
NATIVE = "native"
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Arguments:
    """One attention call."""

    # [B, A, N, D]
    q: Tensor
    # [B, A, L, D]
    k: Tensor
    v: Tensor
    # None, boolean (True = use) or additive, broadcastable to [B, A, N, L]
    mask: Tensor | None
    # further arguments by name: scale, dropout_p, is_causal and the backend's own
    options: dict[str, Any] = field(default_factory=dict)


class Form(Protocol):
    """How one function takes its tensors."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of its call."""
        ...

    def call(self, function: Function, arguments: Arguments) -> Tensor:
        """The function called: [B, A, N, E]."""
        ...

    def answer(self, output: Tensor) -> Tensor:
        """``output`` [B, A, N, E] as its caller expects it."""
        ...


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args)), **kwargs}


class TorchForm:
    """``torch.nn.functional.scaled_dot_product_attention``: heads before tokens."""

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        options = _named(self.names, args, kwargs)
        q, k, v = (options.pop(name) for name in self.names[:3])
        return Arguments(q, k, v, options.pop("attn_mask", None), options)

    def call(self, function: Function, arguments: Arguments) -> Tensor:
        a = arguments
        output: Tensor = function(a.q, a.k, a.v, attn_mask=a.mask, **a.options)
        return output

    def answer(self, output: Tensor) -> Tensor:
        return output


class DispatchForm(TorchForm):
    """A backend of diffusers' dispatcher: tokens before heads.

    ``additive``: a backend that wants no boolean masks.
    """

    def __init__(self, additive: bool = False) -> None:
        self.additive = additive

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        a = super().read(args, kwargs)
        q, k, v, mask = a.q.transpose(1, 2), a.k.transpose(1, 2), a.v.transpose(1, 2), a.mask
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedModel(
                f"Expected a tensor as attention mask; got {type(mask).__name__}, which attention "
                "techniques cannot divide."
            )
        if mask is not None and mask.shape == (k.shape[0], k.shape[2]):  # a row of keys each
            mask = mask[:, None, None]
        return Arguments(q, k, v, mask, a.options)

    def call(self, function: Function, arguments: Arguments) -> Tensor:
        a = arguments
        tensors = dict(zip(self.names, (x.transpose(1, 2) for x in (a.q, a.k, a.v))))
        mask = additive(a.mask, a.q) if self.additive else a.mask
        output: Tensor = function(**tensors, attn_mask=mask, **a.options)
        return output.transpose(1, 2)

    def answer(self, output: Tensor) -> Tensor:
        return output.transpose(1, 2)


class XformersForm:
    """``xformers.ops.memory_efficient_attention``: heads among the rows [B A, N, D], or behind the
    tokens [B, N, A, D]."""

    names = ("query", "key", "value", "attn_bias", "p", "scale")

    def __init__(self, heads: int) -> None:
        self.heads = heads
        # whether the heads are among the rows
        self.flat = True

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        options = _named(self.names, args, kwargs)
        q, k, v = (options.pop(name) for name in self.names[:3])
        mask, options["dropout_p"] = options.pop("attn_bias", None), options.pop("p", 0.0)
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedModel(
                f"Expected a tensor as attn_bias; got {type(mask).__name__}, which attention "
                "techniques cannot divide."
            )
        self.flat = q.ndim == 3
        q, k, v = (self._heads_second(x) for x in (q, k, v))
        if mask is not None:
            mask = self._heads_second(mask) if self.flat else mask
            mask = mask[..., :1, :] if mask.stride(-2) == 0 else mask  # repeated for every query
        return Arguments(q, k, v, mask, options)

    def call(self, function: Function, arguments: Arguments) -> Tensor:
        a = arguments
        options = {"p": 0.0, **a.options}
        options.pop("dropout_p", None)
        bias = additive(a.mask, a.q)
        if bias is not None:
            bias = bias.expand(*a.q.shape[:3], a.k.shape[2])
            length = bias.shape[-1]  # rows of a bias must begin at multiples of 8 elements
            bias = F.pad(bias, (0, -length % 8))[..., :length]
            bias = bias.flatten(0, 1) if self.flat else bias
        tensors = (self.answer(x) for x in (a.q, a.k, a.v))
        return self._heads_second(function(*tensors, attn_bias=bias, **options))

    def answer(self, output: Tensor) -> Tensor:
        return output.flatten(0, 1) if self.flat else output.transpose(1, 2)

    def _heads_second(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.heads, *x.shape[1:]) if self.flat else x.transpose(1, 2)


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask [B, A, N, L] as a bias in the dtype of ``q``: 0 where a boolean one is True."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A place where a processor may look its attention function up."""

    # of the function, as reports call it
    name: str
    # registry or namespace, and the key of the function in it
    table: dict[Any, Any]
    key: Any
    form: Form


def seats_of(module: Any) -> list[Seat]:
    """The places where the processor of an attention layer may find a function other than torch's
    own: its backend in the dispatcher, xformers, a replacement of torch's function."""
    seats = []
    backend = backend_of(module.processor)
    if backend != NATIVE:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        form = DispatchForm(additive=backend == "xformers")
        table = registry._backends
        seats += [Seat(backend, table, key, form) for key in table if key.value == backend]
    ops = xformers_ops()
    if ops is not None:
        by_rows = XformersForm(getattr(module, "heads", 1))
        seats.append(Seat("xformers", vars(ops), "memory_efficient_attention", by_rows))
    replacement = F.scaled_dot_product_attention
    if replacement is not SDPA:
        name = getattr(replacement, "__qualname__", type(replacement).__name__)
        seats.append(Seat(name, vars(F), "scaled_dot_product_attention", TorchForm()))
    return seats


def backend_of(processor: Any) -> str:
    """Name of the dispatcher's backend for a processor: its own, else the active one."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    backend = getattr(processor, "_attention_backend", None)
    if backend is None and dispatch is not None:
        backend = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return NATIVE if backend is None else str(getattr(backend, "value", backend))


def xformers_ops() -> Any:
    """The module of xformers that diffusers' processors call, None where it is not loaded."""
    processors = sys.modules.get("diffusers.models.attention_processor")
    return getattr(getattr(processors, "xformers", None), "ops", None)


Watcher = Callable[[Seat, Function, tuple[Any, ...], dict[str, Any]], Any]
Place = tuple[int, Any]
"""Identity of a table, and a key in it."""
# what calls of the watched places go to, in this context
_WATCHERS: ContextVar[Mapping[Place, Function]] = ContextVar(
    "diffalign_attention", default=MappingProxyType({})
)
# place -> (holders, function before, function that asks for a watcher)
_WATCHED: dict[Place, tuple[int, Function, Function]] = {}
_LOCK = threading.Lock()


@contextmanager
def watched(seats: Sequence[Seat], watcher: Watcher) -> Iterator[None]:
    """Within the block and this context, calls of the seats' functions go to ``watcher``.

    Calls that it makes itself do not.
    """

    def once(seat: Seat, function: Function, *args: Any, **kwargs: Any) -> Any:
        inside = _WATCHERS.set({})
        try:
            return watcher(seat, function, args, kwargs)
        finally:
            _WATCHERS.reset(inside)

    taken: list[Seat] = []
    token = _WATCHERS.set({_place(seat): functools.partial(once, seat) for seat in seats})
    try:
        for seat in seats:
            _take(seat)
            taken.append(seat)
        yield
    finally:
        _WATCHERS.reset(token)
        for seat in reversed(taken):
            _leave(seat)


def _place(seat: Seat) -> Place:
    return id(seat.table), seat.key


def _take(seat: Seat) -> None:
    place = _place(seat)
    with _LOCK:
        if place not in _WATCHED:
            before = seat.table[seat.key]
            asking = seat.table[seat.key] = _asking(place, before)
            _WATCHED[place] = (0, before, asking)
        count, before, asking = _WATCHED[place]
        _WATCHED[place] = (count + 1, before, asking)


def _leave(seat: Seat) -> None:
    place = _place(seat)
    with _LOCK:
        count, before, asking = _WATCHED.pop(place)
        if count > 1:
            _WATCHED[place] = (count - 1, before, asking)
        elif seat.table.get(seat.key) is asking:  # else somebody has set another one since
            seat.table[seat.key] = before


def _asking(place: Place, function: Function) -> Function:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        watcher = _WATCHERS.get().get(place)
        if watcher is None:
            return function(*args, **kwargs)
        return watcher(function, *args, **kwargs)

    return call
