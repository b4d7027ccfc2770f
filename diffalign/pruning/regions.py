"""Regions of an image: its tokens grouped by place and, slightly, by prediction."""

import math

import torch
from torch import Tensor

PREDICTION = 0.05
"""Weight of a token's prediction beside its place, both with the same number of channels."""
ROUNDS = 10
"""Rounds of k-means: on grids of tokens the regions are at rest before that."""


def tiles(grid: tuple[int, int, int], count: int) -> Tensor:
    """The centres [K, 2] of ``K <= count`` tiles of the image, as (y, x) in [0, 1].

    As many rows of tiles as divide ``count`` and make them nearest to square.
    """
    _, height, width = grid
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    down = min(divisors, key=lambda d: abs(math.log(height * count / (width * d * d))))
    down, across = min(down, height), min(count // down, width)
    y, x = ((torch.arange(n) + 0.5) / n for n in (down, across))
    return torch.cartesian_prod(y, x).reshape(-1, 2)


def regions(prediction: Tensor, grid: tuple[int, int, int], count: int) -> Tensor:
    """The region of each token [B, N], numbered from 0, of predictions [B, N, p].

    K-means of ``(0.05 n + y/h, 0.05 n + x/w)``, the first in one half of the channels and the
    second in the other, begun at ``tiles`` and run on the device for ten rounds.
    """
    frames, height, width = grid
    y, x = ((torch.arange(n, device=prediction.device) + 0.5) / n for n in (height, width))
    half = prediction.shape[-1] // 2
    places = torch.cartesian_prod(y, x).repeat(frames, 1)
    features = PREDICTION * prediction.float() + _spread(places, half, prediction.shape[-1])
    centres = _spread(tiles(grid, count).to(prediction.device), half, prediction.shape[-1])
    mean = PREDICTION * prediction.float().mean(1, keepdim=True)
    centres = centres.expand(len(prediction), -1, -1) + mean
    for _ in range(ROUNDS):
        members = torch.nn.functional.one_hot(_nearest(features, centres), centres.shape[1])
        sizes = members.sum(1)[..., None]
        sums = members.to(features.dtype).mT @ features
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return _nearest(features, centres)


def _spread(places: Tensor, half: int, channels: int) -> Tensor:
    """Places [n, 2] as (y, x) on all channels: [n, channels]."""
    y, x = places[:, :1].expand(-1, half), places[:, 1:].expand(-1, channels - half)
    return torch.cat([y, x], 1)


def _nearest(features: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre [B, N] by Euclidean distance."""
    return (2 * features @ centres.mT - centres.square().sum(-1)[:, None]).argmax(-1)
