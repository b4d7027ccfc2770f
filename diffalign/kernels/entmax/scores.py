"""What the solvers share: shifted scores, the map from a threshold to weights, and its closed-form
gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.kernels.choice import accumulator, needs_grad

Solver = Callable[[Tensor, float], Tensor]


def shifted(z: Tensor, alpha: float, mask: Tensor | None) -> Tensor:
    """Scores [..., L] in the accumulator dtype with maximum 0, halved for alpha 1.5, masked keys
    and everything hopeless at -2.

    The threshold is never below -1, so a score at or under -1 has weight 0 wherever it lies; the
    floor keeps its square from swamping sums and -inf from making NaN.
    """
    x = z.to(accumulator(z.dtype))
    if mask is not None:
        x = x.masked_fill(~mask, torch.finfo(x.dtype).min)
    x = x - x.amax(-1, keepdim=True)
    return (x if alpha == 2 else x.mul_(0.5)).clamp_(min=-2.0)


def _weights(solve: Solver, z: Tensor, alpha: float, mask: Tensor | None) -> Tensor:
    x = shifted(z, alpha, mask)
    p = x.sub_(solve(x, alpha)).clamp_(min=0)
    if alpha != 2:
        p.square_()
    p /= p.sum(-1, keepdim=True)
    if mask is not None:
        p.masked_fill_(~mask, 0)
    return p.to(z.dtype)


class _Entmax(torch.autograd.Function):
    """dz = s * (g - <s, g> / sum(s)) with s = p ** (2 - alpha) (Peters et al. 2019, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float, mask: Tensor | None, solve: Solver) -> Tensor:
        p = _weights(solve, z.detach(), alpha, mask)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (p,) = ctx.saved_tensors
        dtype = accumulator(p.dtype)
        s = (p > 0).to(dtype) if ctx.alpha == 2 else p.to(dtype).sqrt()
        g = grad.to(dtype)
        mean = (s * g).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(
            torch.finfo(dtype).tiny
        )
        return (s * (g - mean)).to(p.dtype), None, None, None


def entmax_with(solve: Solver, z: Tensor, alpha: float, mask: Tensor | None) -> Tensor:
    """Check the arguments, then map ``z`` with the given threshold solver, recording the
    closed-form gradient if one is needed."""
    if alpha not in (1.5, 2.0):
        raise ValueError(
            f"entmax: alpha must be 1.5 or 2; got {alpha!r}. Other values have no closed-form "
            "threshold here."
        )
    if not z.is_floating_point():
        raise TypeError(f"entmax: z must be a floating-point tensor; got {z.dtype}.")
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(
            f"entmax: z needs at least one score on its last axis; got shape {list(z.shape)}."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"entmax: mask must be boolean, True where a key may be used; got {mask.dtype}. Add a "
            "bias to z instead."
        )
    if not needs_grad(z):
        return _weights(solve, z, alpha, mask)
    with_gradient: Callable[..., Tensor] = _Entmax.apply
    return with_gradient(z, alpha, mask, solve)
