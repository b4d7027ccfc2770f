"""Weights of samples in log space: their effective number, their mean, and resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from diffalign.core import Tensor

Scheme = Literal["systematic", "stratified", "multinomial"]


def log_mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of ``exp(values)`` over the last axis."""
    return torch.logsumexp(values, dim=-1) - math.log(values.shape[-1])


def effective_size(log_weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2`` over the last axis: how many equal weights these are worth."""
    return 1.0 / log_weights.softmax(-1).square().sum(-1)


def ancestors(log_weights: Tensor, scheme: Scheme, rng: torch.Generator) -> Tensor:
    """Who is copied to each place: log weights [P, K] -> indices [P, K].

    Each scheme copies particle ``k`` on average ``K w_k`` times. Systematic resampling uses one
    random number a row, stratified one for each place; multinomial, the reference, has the largest
    variance.
    """
    shares = log_weights.softmax(-1)
    rows, count = shares.shape
    if scheme == "multinomial":
        return torch.multinomial(shares, count, replacement=True, generator=rng)
    draws = 1 if scheme == "systematic" else count
    offsets = torch.rand(rows, draws, dtype=torch.float64, generator=rng)
    positions = (torch.arange(count, dtype=torch.float64) + offsets) / count
    edges = shares.cumsum(-1)
    edges = edges / edges[:, -1:]
    return torch.searchsorted(edges, positions, right=True).clamp(max=count - 1)


@dataclass(frozen=True, slots=True)
class Weighted:
    """Finished images that together stand for ``p(x0) exp(tilt * score(x0))``.

    A large budget makes the weighted images follow that law; ``effective`` says how far this one
    carries, and no claim about the law should stand without it.
    """

    # [N], float64
    scores: Tensor
    # [N], float64, not normalised
    log_weights: Tensor
    # log of the estimate of Z, the mean of exp(tilt * score) under the model
    log_evidence: float

    @property
    def effective(self) -> float:
        """Number of equal weights that these are worth."""
        return float(effective_size(self.log_weights))

    @property
    def shares(self) -> Tensor:
        """[N]: normalised weights."""
        return self.log_weights.softmax(-1)

    def pick(self, count: int, rng: torch.Generator) -> list[int]:
        """Indices of ``count`` independent samples of the weighted images."""
        picks: list[int] = torch.multinomial(
            self.shares, count, replacement=True, generator=rng
        ).tolist()
        return picks

    def mean(self) -> float:
        """Mean score under the weights."""
        return float((self.shares * self.scores).sum())
