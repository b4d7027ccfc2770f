"""The norm of Gaussian noise: how likely it is, and how an optimiser is kept near it.

The norm r of d independent standard normal values follows a chi law, ``log p(r) = (d - 1) log r -
r^2 / 2 + const``, with its mode at ``sqrt(d - 1)``. It is one of d degrees of freedom: noise on the
shell can still be far from Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def chi_log_p(noise: Tensor) -> Tensor:
    """``(d - 1) log r - r^2 / 2`` [B], float64, of noise [B, ...]; constants are left out."""
    d = noise[0].numel()
    r = noise.double().flatten(1).norm(dim=1)
    value: Tensor = (d - 1) * r.log() - r.square() / 2
    return value


def chi_gradient(noise: Tensor) -> Tensor:
    """Gradient of ``chi_log_p`` in the noise: ``((d - 1) / r - r) noise / r``, float32."""
    d = noise[0].numel()
    wide = noise.double()
    r = wide.flatten(1).norm(dim=1).view(-1, *[1] * (noise.ndim - 1))
    gradient: Tensor = ((d - 1) / r - r) * wide / r
    return gradient.float()


def clipped(gradient: Tensor, limit: float | None) -> Tensor:
    """Each image's gradient with its norm at most ``limit``; None leaves it as it is."""
    if limit is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    factor: Tensor = limit / norm.clamp(min=limit)
    return gradient * factor


def usual_rate(shape: Sequence[int]) -> float:
    """The learning rate that moves noise of one image by the same share of its norm at any size.

    ReNO's 5 at d = 16,384 values; a step is at most ``rate * clip / (1 - momentum)``, so the rate
    grows with ``sqrt(d)``, as the norm does.
    """
    return 5.0 * math.sqrt(math.prod(shape) / 16384)
