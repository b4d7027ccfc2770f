"""A technique's own dense calls: by the backend that the user chose, by torch where it cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.kernels.choice import needs_grad
from diffalign.kernels.partial import Part, attend_part
from diffalign.seams.attention.seats import NATIVE, SDPA, Arguments, Form, Function

# what a backend raises for a call that it cannot serve
UNABLE = (ValueError, TypeError, RuntimeError, AssertionError, IndexError)
# of the device, whatever the backend
FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)
Kind = tuple[object, ...]
"""A backend and what it may depend on whether it can serve a call."""


class Usage:
    """Which attention backends ran at which layers of one generation, and which gave way."""

    def __init__(self) -> None:
        # backend -> layers at which dense calls of techniques ran on it
        self.layers: dict[str, set[str]] = {}
        # backend -> (why it gave way first, the layers where it did)
        self.gaps: dict[str, tuple[str, set[str]]] = {}
        # calls that a backend cannot serve -> why
        self.reasons: dict[Kind, str] = {}

    def ran(self, backend: str, layer: str) -> None:
        """A dense call ran on a backend at a layer."""
        self.layers.setdefault(backend, set()).add(layer)

    def gave_way(self, backend: str, reason: str, layer: str) -> None:
        """A backend could not serve a call at a layer."""
        self.gaps.setdefault(backend, (reason, set()))[1].add(layer)

    def notes(self) -> list[str]:
        """One note for each backend that gave way."""
        return [
            f"attention backend {backend!r} gives way to native attention at {len(layers)} layers "
            f"while the techniques act: {reason}"
            for backend, (reason, layers) in self.gaps.items()
        ]


@dataclass(frozen=True, slots=True)
class Dense:
    """Dense attention at one layer, by the function that its processor called."""

    # of the backend
    name: str
    function: Function
    form: Form
    # the processor's call, whose options hold for every other
    arguments: Arguments
    # dotted module name
    layer: str
    usage: Usage

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``q`` [B, A, N, D], ``k`` [B, A, L, D], ``v`` [B, A, L, E] -> [B, A, N, E]."""
        options = self.arguments.options
        if self.name != NATIVE:
            output = self._chosen(replace(self.arguments, q=q, k=k, v=v, mask=mask))
            if output is not None:
                return output
            options = {"scale": options.get("scale")}
        self.usage.ran(NATIVE, self.layer)
        return SDPA(q, k, v, attn_mask=mask, **options)

    def part(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Part | None:
        """Attention over some of the keys and the log-sum-exp of its scores, None where the
        backend does not tell it."""
        if self.name != NATIVE or mask is not None:
            return None
        part = attend_part(q, k, v, scale=self.arguments.options.get("scale"))
        if part is not None:
            self.usage.ran(NATIVE, self.layer)
        return part

    def _chosen(self, call: Arguments) -> Tensor | None:
        """The user's backend, None where it cannot serve the call."""
        grad = needs_grad(call.q, call.k, call.v)
        mask = None if call.mask is None else (call.mask.dtype, call.mask.shape[-2:-1] == (1,))
        kind = (self.name, call.q.dtype, call.q.shape[-1], call.v.shape[-1], mask, grad)
        reason = self.usage.reasons.get(kind)
        if reason is None:
            try:
                output = self.form.call(self.function, call)
            except FATAL:
                raise
            except UNABLE as error:
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            else:
                reason = _unfit(output, call, grad)
                if reason is None:
                    self.usage.ran(self.name, self.layer)
                    return output
            self.usage.reasons[kind] = reason
        self.usage.gave_way(self.name, reason, self.layer)
        return None


def _unfit(output: object, call: Arguments, grad: bool) -> str | None:
    """Why the result of a backend cannot be used, None when it can."""
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    if not isinstance(output, Tensor) or output.shape != shape:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        return f"it returned {got} where {list(shape)} was expected"
    if grad and not output.requires_grad:
        return "its result carries no gradient"
    return None
