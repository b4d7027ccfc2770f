"""Interception: the user's own processor runs, and its attention call goes through the techniques.

A ``TorchFunctionMode`` belongs to the thread that entered it, and ``seats.watched`` to its context,
so another thread that shares the module never notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffalign.core import AttentionTechnique, Site, UnsupportedModel
from diffalign.kernels.partial import Part
from diffalign.seams.attention.dense import Dense, Usage
from diffalign.seams.attention.seats import (
    NATIVE,
    SDPA,
    Arguments,
    Form,
    Seat,
    TorchForm,
    watched,
)

Attention = Callable[[Arguments, Dense], Tensor]
Rows = Sequence[int]


class Intercepted(TorchFunctionMode):
    """Sends the ``number``-th attention call of one layer through ``attend``: the first argument is
    the call, the second runs dense attention as the layer's processor would have run it.

    Calls of torch's own function are caught by the mode itself, others where they are looked up.
    """

    def __init__(
        self, number: int, seats: Sequence[Seat], layer: str, usage: Usage, attend: Attention
    ) -> None:
        super().__init__()
        self.number, self.seats, self.layer, self.usage = number, seats, layer, usage
        self.attend = attend
        # attention calls so far
        self.calls = 0
        # whether such a call is running, whose own calls are not intercepted
        self.busy = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        with ExitStack() as stack:
            stack.push(super().__exit__)
            stack.enter_context(watched(self.seats, self._caught))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not SDPA or self.busy:
            return func(*args, **kwargs)
        return self._one(NATIVE, TorchForm(), SDPA, args, kwargs)

    def _caught(self, seat: Seat, function: Any, args: Any, kwargs: Any) -> Any:
        return self._one(seat.name, seat.form, function, args, kwargs)

    def _one(self, name: str, form: Form, function: Any, args: Any, kwargs: Any) -> Any:
        """One attention call of the processor."""
        self.calls += 1
        self.busy = True
        try:
            if self.calls - 1 != self.number:
                return function(*args, **kwargs)
            call = form.read(args, kwargs)
            dense = Dense(name, function, form, call, self.layer, self.usage)
            return form.answer(self.attend(call, dense))
        finally:
            self.busy = False


@dataclass(frozen=True, slots=True)
class Below:
    """What stands below a technique at one layer: the contract ``core.Attend``."""

    site: Site
    # None, boolean (True = use) or additive, broadcastable to [B, A, N, L]
    mask: Tensor | None
    # attention without any technique, by the backend that the user chose
    dense: Dense
    # techniques further in, outermost first
    techniques: tuple[AttentionTechnique, ...]
    # (operation, key, make) -> the kernel chosen once per key and run
    kernel: Callable[[str, Any, Callable[[], Any]], Any]

    @property
    def scale(self) -> float | None:
        return self.dense.arguments.options.get("scale")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.techniques:
            below = replace(self, techniques=self.techniques[1:])
            return self.techniques[0](below, q, k, v, self.site)
        return self.dense(q, k, v, self.mask)

    def part(self, q: Tensor, k: Tensor, v: Tensor) -> Part | None:
        """Attention over some of the keys and the log-sum-exp of its scores.

        None where another technique or a mask stands below, or the backend does not tell it.
        """
        return None if self.techniques else self.dense.part(q, k, v, self.mask)

    def narrow(
        self,
        site: Site,
        rows: Rows | None = None,
        queries: Sequence[slice] | None = None,
        keys: Sequence[slice] | None = None,
    ) -> Below:
        """The same layer for some rows and parts of queries and keys; ``site`` is what is left."""
        mask = self.mask
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            if rows is not None and mask.shape[0] > 1:
                mask = take(mask, rows)
            if queries is not None and mask.shape[2] > 1:
                mask = cut(mask, queries, 2)
            if keys is not None and mask.shape[3] > 1:
                mask = cut(mask, keys, 3)
        return replace(self, site=site, mask=mask)


def start(
    call: Arguments,
    dense: Dense,
    site: Site,
    techniques: Sequence[AttentionTechnique],
    kernel: Callable[[str, Any, Callable[[], Any]], Any],
) -> Tensor:
    """Send one intercepted call through ``techniques``, outermost first."""
    options = call.options
    if options.get("is_causal") or options.get("dropout_p"):
        raise UnsupportedModel(
            f"{site.layer!r} uses causal or dropout attention, which attention techniques do not "
            "support."
        )
    q, k, v = call.q, call.k, call.v
    if options.get("enable_gqa") and k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    options = {key: value for key, value in options.items() if key != "enable_gqa"}
    dense = replace(dense, arguments=replace(call, options=options))
    return Below(site, call.mask, dense, tuple(techniques), kernel)(q, k, v)


def cut(x: Tensor, parts: Sequence[slice], axis: int = 2) -> Tensor:
    """``parts`` of one axis, one after the other; neighbouring parts stay a view."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    pieces = [x.narrow(axis, part.start, part.stop - part.start) for part in joined]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def take(x: Tensor, rows: Rows) -> Tensor:
    """``rows`` of the first axis; neighbouring rows stay a view."""
    if _neighbours(rows):
        return x[rows[0] : rows[-1] + 1]
    return x[torch.tensor(rows, device=x.device)]


def put(x: Tensor, rows: Rows, value: Tensor) -> Tensor:
    """A copy of ``x`` with ``rows`` of the first axis replaced; ``value`` itself when those are all
    rows in order."""
    if _neighbours(rows):  # without an index, which would have to travel to the device
        pieces = [piece for piece in (x[: rows[0]], value, x[rows[-1] + 1 :]) if len(piece)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return x.index_copy(0, torch.tensor(rows, device=x.device), value)


def _neighbours(rows: Rows) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))


def together(*parts: slice) -> tuple[list[slice], list[slice]]:
    """``parts`` in sequence order, and where each of them (in the order given) lies when only these
    are kept."""
    ordered = sorted(parts, key=lambda part: part.start)
    places, end = {}, 0
    for part in ordered:
        places[part.start] = slice(end, end + part.stop - part.start)
        end += part.stop - part.start
    return ordered, [places[part.start] for part in parts]
