"""The epilogue of NAG, normalised attention guidance (Chen et al.

2025, arXiv:2505.21179): ``choose`` picks torch or the fused kernel.
"""

from typing import Protocol

from torch import Tensor

from diffalign.kernels.choice import Backend, Choice, pick, why_not_triton
from diffalign.kernels.nag.naive import Norm, nag


class NagCall(Protocol):
    """``naive.nag`` and everything that may stand in for it."""

    def __call__(
        self,
        z_pos: Tensor,
        z_neg: Tensor,
        *,
        scale: float,
        tau: float,
        alpha: float,
        norm: Norm = "l1",
    ) -> Tensor: ...


def choose(z: Tensor, *, backend: Backend = "auto") -> Choice[NagCall]:
    """The callable for a call site whose attention outputs [B, N, E] look like ``z``, and the
    reason. Reads shape, dtype and device only.

    Raises:
        ValueError: unknown ``backend``, or "triton" where the kernel cannot run.
    """
    from diffalign.kernels.nag import triton as fused

    refusal = why_not_triton(z.device) or fused.refusal(z.dtype, z.shape[-1])
    what = f"{str(z.dtype).removeprefix('torch.')} rows of {z.shape[-1]} channels"
    plain: NagCall = nag
    return pick("nag", fused.nag, plain, refusal, what, backend)


__all__ = ["NagCall", "Norm", "choose", "nag"]
