"""Which tokens a step computes: pure functions on one value per token, without a host sync.

All return indices [B, S], rising and without repetition.
"""

import math

import torch
from torch import Tensor

from diffalign.kernels.selection import choose

STARVATION = 0.1
"""What each time that a token was left out adds to the exponent of its weight in RAS."""


def _stride(count: int) -> int:
    """Tokens from one name of ``spread`` to the next: the golden ratio of all."""
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) != 1:
        step += 1
    return step


def spread(count: int, device: torch.device | None = None) -> Tensor:
    """The numbers below ``count`` in an order whose neighbours are far apart: steps of the golden
    ratio."""
    return torch.arange(count, device=device) * _stride(count) % count


def turns(count: int, device: torch.device | None = None) -> Tensor:
    """The position of each number below ``count`` in ``spread``."""
    return torch.arange(count, device=device) * pow(_stride(count), -1, count) % count


def ordered(values: Tensor) -> Tensor:
    """Integers of the order of ``values``, which are taken as float32; equal for equal ones."""
    bits = (values.float() + 0.0).view(torch.int32)  # no negative zero
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def in_turn(batch: int, tokens: int, count: int, step: int, device: torch.device) -> Tensor:
    """Every token in turn, ``count`` at a step: each within ``ceil(tokens / count)`` steps."""
    places = (torch.arange(count, device=device) + step * count) % tokens
    return spread(tokens, device)[places].sort().values.expand(batch, -1)


def at_random(batch: int, tokens: int, count: int, step: int, device: torch.device) -> Tensor:
    """``count`` tokens of all, anew at each step, the same in every image and every run."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(step))
    return order[:count].sort().values.to(device).expand(batch, -1)


def largest(values: Tensor, count: int) -> Tensor:
    """The tokens with the largest of ``values`` [B, N]; of equal ones the first."""
    return choose(values.device, values.shape[1]).call.smallest(-ordered(values), count)


def starving(prediction: Tensor, drops: Tensor, count: int) -> Tensor:
    """RAS (Liu et al. 2025, arXiv:2502.10389): the largest standard deviation of a token's
    prediction [B, N, p], times ``exp(0.1 * drops)`` with the number of times it was left out."""
    deviation = prediction.float().std(-1)
    return largest(deviation * torch.exp(STARVATION * drops), count)


def by_region(delta: Tensor, labels: Tensor, quotas: Tensor, count: int) -> Tensor:
    """``count`` tokens, region by region.

    Regions come by falling norm of the channel-wise largest ``delta`` [B, N, p], and give the
    tokens of their largest norms; ``quotas`` [K]: how many the first, second, ... gives before the
    others have had their turn.
    """
    selection = choose(labels.device, labels.shape[1]).call
    rank, regions = selection.ranks(delta.norm(dim=-1), labels), len(quotas)
    index = labels[..., None].expand_as(delta)
    empty = delta.new_full((len(delta), regions, delta.shape[-1]), -torch.inf)
    largest_change = empty.scatter_reduce(1, index, delta, "amax")
    sizes = torch.nn.functional.one_hot(labels, regions).sum(1)
    value = largest_change.norm(dim=-1).where(sizes > 0, -1.0)
    turn_of = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # of each region
    turn = turn_of.gather(1, labels)
    tokens = labels.shape[1]
    late = (rank >= quotas[turn]).long()
    return selection.smallest(turn * tokens + rank + late * (regions * tokens), count)


def with_stalest(visits: Tensor, moving: Tensor, count: int) -> Tensor:
    """``moving`` [B, any] and the tokens with the smallest ``visits`` [B, N], ``count`` of both
    together; of equal ones those that ``spread`` names first."""
    tokens, device = visits.shape[1], visits.device
    ages = ordered(visits.scatter(1, moving, -torch.inf))
    return choose(device, tokens).call.smallest(ages * tokens + turns(tokens, device), count)
