"""Keys and values of some tokens written among those of all, as attention over a kept sequence
needs: ``choose`` picks torch or the fused kernel."""

from typing import Protocol

from torch import Tensor

from diffalign.kernels.choice import Backend, Choice, pick, why_not_triton
from diffalign.kernels.tokens.naive import write


class WriteCall(Protocol):
    """``naive.write`` and everything that may stand in for it."""

    def __call__(
        self,
        keys: Tensor,
        values: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        *,
        text_first: bool,
    ) -> None: ...


def choose(k: Tensor, *, plain: WriteCall = write, backend: Backend = "auto") -> Choice[WriteCall]:
    """The callable for a layer whose new keys [B, A, L + S, D] look like ``k``, and the reason.

    Reads shape, dtype and device only. ``plain``: what runs where the kernel cannot.
    Raises:
        ValueError: unknown ``backend``, or "triton" where the kernel cannot run.
    """
    from diffalign.kernels.tokens import triton as fused

    heads, size = k.shape[1], k.shape[-1]
    refusal = why_not_triton(k.device) or fused.refusal(k.dtype, heads, size)
    what = f"{str(k.dtype).removeprefix('torch.')}, {heads} heads of size {size}"
    return pick("tokens", fused.write, plain, refusal, what, backend)


__all__ = ["WriteCall", "choose", "write"]
