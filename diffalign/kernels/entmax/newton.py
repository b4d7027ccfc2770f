"""The same maps without a sort: Newton's method for the threshold, the form that kernels and
``torch.compile`` like.

``sum (x - tau)_+^2 - 1`` is convex and decreasing in ``tau``, so Newton started left of the root,
at -1, climbs to it without overshooting and never empties the support. The piecewise linear
function of sparsemax is finished exactly after finitely many steps (Michelot 1986).
"""

import torch
from torch import Tensor

from diffalign.kernels.entmax.scores import entmax_with


def iterations(keys: int) -> int:
    """Newton steps that reach float32 precision on the families of rows in
    tests/kernels/test_entmax.py, up to 16384 keys.

    Not a bound: rows of thousands of keys can be made for which sparsemax needs more.
    """
    return 8 if keys <= 512 else 10 if keys <= 4608 else 13


def solve(x: Tensor, alpha: float) -> Tensor:
    """Threshold ``tau`` [..., 1] for shifted scores ``x`` [..., L] (maximum 0); contract of
    ``naive.solve``.

    Cost: 8 sweeps over ``x`` up to 512 keys, 10 up to 4608, 13 above (6 more in float64), two
    reductions each, one buffer of its size.
    """
    tau = torch.full_like(x[..., :1], -1.0)
    for _ in range(iterations(x.shape[-1]) + 6 * (x.dtype == torch.float64)):
        u = (x - tau).clamp_(min=0)
        total = u.sum(-1, keepdim=True)
        if alpha == 2:
            tau = tau + (total - 1) / (u > 0).sum(-1, keepdim=True)
        else:
            tau = tau + (torch.linalg.vecdot(u, u).unsqueeze(-1) - 1) / (2 * total)
    return tau


def entmax(z: Tensor, alpha: float = 1.5, *, mask: Tensor | None = None) -> Tensor:
    """alpha-entmax of scores ``z`` [..., L] over the last axis by Newton's method; arguments as
    ``diffalign.kernels.entmax.entmax``."""
    return entmax_with(solve, z, alpha, mask)
