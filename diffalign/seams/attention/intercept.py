"""Interception: the user's own processor runs, and its call of ``scaled_dot_product_attention``
goes through the techniques.

A ``TorchFunctionMode`` belongs to the thread that entered it, so another thread that shares the
module never notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffalign.core import AttentionTechnique, Site, UnsupportedModel

Rows = Sequence[int]
PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SDPA = F.scaled_dot_product_attention


class Intercepted(TorchFunctionMode):
    """Sends the ``number``-th scaled-dot-product call inside the block through ``attend``."""

    def __init__(
        self,
        number: int,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor],
    ) -> None:
        super().__init__()
        self.number, self.attend = number, attend
        # scaled-dot-product calls so far
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls - 1 != self.number:
            return func(*args, **(kwargs or {}))
        options = {**dict(zip(PARAMETERS, args)), **(kwargs or {})}
        q, k, v = options.pop("query"), options.pop("key"), options.pop("value")
        return self.attend(q, k, v, options.pop("attn_mask", None), options)


@dataclass(frozen=True, slots=True)
class Below:
    """What stands below a technique at one layer: the contract ``core.Attend``."""

    site: Site
    # None, boolean (True = use) or additive, broadcastable to [B, A, N, L]
    mask: Tensor | None
    # further arguments of scaled_dot_product_attention
    options: dict[str, Any]
    # techniques further in, outermost first
    techniques: tuple[AttentionTechnique, ...]
    # (operation, key, make) -> the kernel chosen once per key and run
    kernel: Callable[[str, Any, Callable[[], Any]], Any]

    @property
    def scale(self) -> float | None:
        return self.options.get("scale")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.techniques:
            below = replace(self, techniques=self.techniques[1:])
            return self.techniques[0](below, q, k, v, self.site)
        return SDPA(q, k, v, attn_mask=self.mask, **self.options)

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    site: Site,
    techniques: Sequence[AttentionTechnique],
    kernel: Callable[[str, Any, Callable[[], Any]], Any],
) -> Tensor:
    """Send one intercepted call through ``techniques``, outermost first."""
    if options.get("is_causal") or options.get("dropout_p"):
        raise UnsupportedModel(
            f"{site.layer!r} uses causal or dropout attention, which attention techniques do not "
            "support."
        )
    if options.get("enable_gqa") and k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    options = {key: value for key, value in options.items() if key != "enable_gqa"}
    return Below(site, mask, options, tuple(techniques), kernel)(q, k, v)


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
