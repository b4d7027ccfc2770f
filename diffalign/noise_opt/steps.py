"""One step of an optimiser, uphill: Nesterov's momentum and AdamW as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)


def nesterov(
    gradient: Tensor, moments: tuple[Tensor, ...], momentum: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The update, to be multiplied by the rate, and the momentum that goes on.

    As ``torch.optim.SGD(nesterov=True)``: the first momentum is the gradient.
    """
    buffer = gradient if not moments else momentum * moments[0] + gradient
    return gradient + momentum * buffer, (buffer,)


def adam(
    gradient: Tensor, moments: tuple[Tensor, ...], eps: float = 1e-8
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The update, to be multiplied by the rate, and (mean, mean square, count) that go on.

    As ``torch.optim.AdamW``, whose decay of the weights is the caller's.
    """
    zero = torch.zeros_like(gradient)
    first, second, count = moments or (zero, zero, torch.zeros((), dtype=torch.float64))
    low, high = BETAS
    first = low * first + (1 - low) * gradient
    second = high * second + (1 - high) * gradient.square()
    count = count + 1
    bias, square = (1 - beta ** float(count) for beta in BETAS)
    update = (first / bias) / ((second / square).sqrt() + eps)
    return update, (first, second, count)
