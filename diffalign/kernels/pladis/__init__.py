"""PLADIS, dense-sparse cross-attention (Kim & Sim 2025, arXiv:2503.07677): ``choose`` picks torch
or the fused kernel for a call site."""

from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.kernels.choice import Backend, Choice, pick, why_not_triton
from diffalign.kernels.pladis import eager, tiles
from diffalign.kernels.pladis.joint import pladis_joint


class PladisCall(Protocol):
    """Attention with the map ``w = (1 - strength) softmax(z) + strength entmax(z)``, ``z = scale q
    k^T + mask``: the contract of all forms.

    ``q`` [B, A, N, D]; ``k``, ``v`` [B, A, L, D] with the same heads; result [B, A, N, D] in the
    dtype of ``q``. ``strength`` 0 is dense attention, 1 purely sparse, the published default 2
    extrapolates: rows of ``w`` sum to 1 and keys outside the support get ``(1 - strength)
    softmax(z)``. ``alpha`` is 1.5 (entmax) or 2 (sparsemax). ``scale`` None is ``1 / sqrt(D)``.
    ``mask`` broadcasts to [B, A, N, L]: boolean (True = use) or an additive bias of any floating
    dtype; a key masked by False or -inf gets weight 0, a row without keys gives 0. With ``base``
    [B, A, N, D], the dense attention output of the same rows, the result is the anchored form
    ``base + strength * mass * (entmax(z) - softmax(z)) v``; ``mass`` [B, A, N] (default 1) is the
    weight the rows put on these keys when they are only a part of the attended sequence.
    Differentiable once in q, k, v, base and mass (then the torch form runs).

    Raises:
        ValueError: shapes that do not fit, no keys, a non-finite ``strength``, another ``alpha``,
        ``mass`` without ``base``. TypeError: dtypes or devices that differ, a mask that is neither
        boolean nor floating point.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        strength: float,
        alpha: float = 1.5,
        mask: Tensor | None = None,
        scale: float | None = None,
        base: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor: ...


pladis: PladisCall = eager.pladis


def choose(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto"
) -> Choice[PladisCall]:
    """The callable for a call site that sees tensors like these, and the reason. Reads shapes,
    dtype and device only.

    Raises:
        ValueError: unknown ``backend``, or "triton" where the kernel cannot run.
    """
    from diffalign.kernels.pladis import triton as fused

    size, keys = q.shape[-1], k.shape[-2]
    refusal = why_not_triton(q.device)
    if refusal is None:
        device: Any = torch.cuda.get_device_properties(q.device)
        shared_kb: int = device.shared_memory_per_block_optin >> 10
        refusal = tiles.refusal(q.dtype, size, keys, shared_kb)
    if refusal is None and not fused.is_key_mask(mask, keys):
        refusal = "the mask is not one row of keys per batch entry"
    what = f"{str(q.dtype).removeprefix('torch.')}, head size {size}, {keys} keys"
    return pick("pladis", fused.pladis, pladis, refusal, what, backend)


__all__ = ["PladisCall", "choose", "pladis", "pladis_joint"]
