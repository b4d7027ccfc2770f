"""Which implementation of a kernel runs, decided once per call site and said in one line.

The decision depends on the device, the dtype and sizes only, never on values, so that it costs no
device synchronisation and holds for a whole run. What differs from call to call (gradients) is
handled inside the chosen callable.
"""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Generic, Literal, NamedTuple, TypeVar

import torch

log = logging.getLogger("diffalign.kernels")
Call = TypeVar("Call")
Backend = Literal["auto", "torch", "triton"]
MIN_CAPABILITY = (
    8,
    0,
    # 16-bit tensor cores with asynchronous copies; the tiles are compiled ahead of time for 8.0 and
    # 9.0
)


class Choice(NamedTuple, Generic[Call]):
    """A callable and the reason it was picked, ``"triton: ..."`` or ``"torch: ..."``, ready for a
    session report."""

    call: Call
    reason: str


def why_not_triton(device: torch.device) -> str | None:
    """None if Triton kernels can run on ``device``, else the reason in one clause."""
    if device.type != "cuda":
        return f"{device.type} tensors"
    if torch.version.hip is not None:
        return "ROCm build, the tiles are only checked for CUDA"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def pick(
    op: str, fused: Call, plain: Call, refusal: str | None, what: str, backend: Backend
) -> Choice[Call]:
    """``fused`` unless ``refusal`` says why not or ``backend`` is "torch"; ``what`` describes the
    site in the reason.

    Raises:
        ValueError: unknown ``backend``, or "triton" was demanded where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{op}: backend must be 'auto', 'torch' or 'triton'; got {backend!r}.")
    if backend == "triton" and refusal is not None:
        raise ValueError(
            f"{op}: backend='triton' cannot run for {what}: {refusal}. Use backend='auto' or "
            "'torch'."
        )
    if backend == "torch":
        refusal = "asked for"
    if refusal is None:
        return Choice(fused, f"triton: {what}")
    note_once(op, f"torch: {refusal} ({what})")
    return Choice(plain, f"torch: {refusal} ({what})")


@cache
def note_once(op: str, reason: str) -> None:
    """Log a fallback of ``op`` once per process and reason."""
    log.info("%s: %s", op, reason)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if autograd would record an operation on any of ``tensors`` now."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel works: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast switched off, which would take the float32 products of a kernel back to 16 bits."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else nullcontext()
    )


def check_finite(op: str, **values: float) -> None:
    """Raise ValueError naming the first argument that is not a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be a finite number; got {value!r}.")
