"""Which tokens a step computes: pure functions on one value per token, without a host sync.

All return indices [B, S], rising and without repetition.
"""

import math

import torch
from torch import Tensor

STARVATION = 0.1
"""What each time that a token was left out adds to the exponent of its weight in RAS."""


def spread(count: int, device: torch.device | None = None) -> Tensor:
    """The numbers below ``count`` in an order whose neighbours are far apart: steps of the golden
    ratio."""
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) != 1:
        step += 1
    return torch.arange(count, device=device) * step % count


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
    order = values.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(1).values


def starving(prediction: Tensor, drops: Tensor, count: int) -> Tensor:
    """RAS (Liu et al. 2025, arXiv:2502.10389): the largest standard deviation of a token's
    prediction [B, N, p], times ``exp(0.1 * drops)`` with the number of times it was left out."""
    deviation = prediction.float().std(-1)
    return largest(deviation * torch.exp(STARVATION * drops), count)


def ranks(values: Tensor, labels: Tensor) -> Tensor:
    """The position of each token [B, N] among those of its label, by falling value."""
    by_value = values.argsort(dim=1, descending=True, stable=True)
    order = by_value.gather(1, labels.gather(1, by_value).argsort(dim=1, stable=True))
    ordered = labels.gather(1, order)
    first = torch.searchsorted(ordered, ordered)  # where the label begins
    positions = torch.arange(labels.shape[1], device=labels.device) - first
    return torch.zeros_like(order).scatter(1, order, positions)


def by_region(delta: Tensor, labels: Tensor, quotas: Tensor, count: int) -> Tensor:
    """``count`` tokens [B, count], not sorted, region by region.

    Regions come by falling norm of the channel-wise largest ``delta`` [B, N, p], and give the
    tokens of their largest norms; ``quotas`` [K]: how many the first, second, ... gives before the
    others have had their turn.
    """
    rank, regions = ranks(delta.norm(dim=-1), labels), len(quotas)
    index = labels[..., None].expand_as(delta)
    empty = delta.new_full((len(delta), regions, delta.shape[-1]), -torch.inf)
    largest_change = empty.scatter_reduce(1, index, delta, "amax")
    sizes = torch.nn.functional.one_hot(labels, regions).sum(1)
    value = largest_change.norm(dim=-1).where(sizes > 0, -1.0)
    turns = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # region -> its turn
    turn = turns.gather(1, labels)
    tokens = labels.shape[1]
    late = (rank >= quotas[turn]).long()
    key: Tensor = turn * tokens + rank + late * (regions * tokens)
    return key.argsort(dim=1)[:, :count]


def stalest(visits: Tensor, taken: Tensor, count: int) -> Tensor:
    """``count`` tokens [B, count] with the smallest ``visits`` [B, N], none of ``taken`` [B, any];
    of equal ones those that ``spread`` names first."""
    order = spread(visits.shape[1], visits.device)
    ages = visits.scatter(1, taken, torch.inf)[:, order]
    return order[ages.argsort(dim=1, stable=True)[:, :count]]
