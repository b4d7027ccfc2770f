"""What a score is compared with in FIND: the mean of others, of the past, or a prediction."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.noise_opt.steps import adam

KEPT = 32
"""Steps whose scores the network is fitted to."""
WIDTH, FITS, RATE = 256, 5, 1e-4
"""Hidden width, updates a step and learning rate of the network, as published."""


def calibrate(
    kind: Literal["leave-one-out", "mean", "learned"],
    scores: Tensor,
    point: Tensor,
    memory: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What ``scores`` [B] of draws from the law ``point`` [2, ...] are compared with, [B], and what
    is remembered for the next step."""
    if kind == "leave-one-out":
        return (scores.sum() - scores) / (len(scores) - 1), ()
    if kind == "mean":
        total, count = memory or (torch.zeros((), dtype=torch.float64),) * 2
        mean = total / count if count else scores.mean()
        return mean.expand(len(scores)), (total + scores.sum(), count + len(scores))
    return _predicted(scores, point, memory)


def _predicted(
    scores: Tensor, point: Tensor, memory: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The network's prediction after it was fitted to the last steps, this one included, from the
    mean of their scores on.

    Memory: laws [K, 2 d] and mean scores [K] of those steps, then the weights, then their moments.
    """
    law, mean = point.flatten()[None], scores.mean().float()[None]
    laws, means, *network = memory or (law[:0], mean[:0], *_network(law.shape[1]))
    laws, means = torch.cat([laws, law])[-KEPT:], torch.cat([means, mean])[-KEPT:]
    level, half = means.mean(), len(network) // 4
    weights, moments = network[:half], network[half:]
    for _ in range(FITS):
        weights, moments = _fitted(weights, moments, laws, means - level)
    prediction = (level + _forward(weights, law)).double()
    return prediction.expand(len(scores)), (laws, means, *weights, *moments)


def _network(size: int) -> list[Tensor]:
    """Weights and biases of four layers, then three moments of each."""
    rng = torch.Generator().manual_seed(0)
    sizes = (size, WIDTH, WIDTH, WIDTH, 1)
    weights: list[Tensor] = []
    for before, after in itertools.pairwise(sizes):
        bound = before**-0.5
        weights.append((torch.rand(after, before, generator=rng) * 2 - 1) * bound)
        weights.append(torch.zeros(after))
    moments = [
        moment
        for weight in weights
        for moment in (
            torch.zeros_like(weight),
            torch.zeros_like(weight),
            torch.zeros((), dtype=torch.float64),
        )
    ]
    return [*weights, *moments]


def _forward(weights: list[Tensor], laws: Tensor) -> Tensor:
    """Predicted mean scores [K] of laws [K, 2 d]."""
    x = laws
    for layer in range(0, len(weights), 2):
        x = F.linear(x, weights[layer], weights[layer + 1])
        x = F.relu(x) if layer < len(weights) - 2 else x
    return x[:, 0]


def _fitted(
    weights: list[Tensor], moments: list[Tensor], laws: Tensor, means: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """One AdamW update of the squared error."""
    with torch.enable_grad():
        leaves = [weight.requires_grad_() for weight in weights]
        error = (_forward(leaves, laws) - means).square().mean()
        gradients = torch.autograd.grad(error, leaves)
    after: list[Tensor] = []
    later: list[Tensor] = []
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        update, state = adam(gradient, tuple(moments[3 * number : 3 * number + 3]))
        after.append(leaf.detach() - RATE * update)
        later += state
    return after, later
