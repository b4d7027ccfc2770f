"""Gaussian mixtures: data whose denoiser, and whose law under any reward, are formulas.

``Mixture`` is the data, ``Chain`` a stochastic sampler on given noise levels (the eta-kernel:
DDIM's with eta on a variance-preserving schedule, its twin on a flow). In one dimension ``Exact``
computes on a grid what no sampler can: the law ``p(x0) exp(tilt * reward(x0)) / Z`` of the chain
*as it is discretised*, all values V_t, and Z. All is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

# points [B, D], float64 -> rewards [B], float64
Function = Callable[[Tensor], Tensor]


class Denoiser(Protocol):
    """What a chain needs of a model."""

    @property
    def size(self) -> int:
        """D, numbers of one image."""
        ...

    def clean(self, x: Tensor, alpha: float, s: float) -> Tensor:
        """The prediction of x0 [B, D] at ``x = alpha * x0 + s * noise`` [B, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Mixture:
    """Data: ``M`` Gaussians of equal width in all ``D`` directions, float64."""

    # [M, D]
    means: Tensor
    # [M]
    stds: Tensor
    # [M], they sum to 1
    weights: Tensor

    @classmethod
    def of(
        cls,
        means: Sequence[Sequence[float]],
        stds: Sequence[float] | float,
        weights: Sequence[float] | None = None,
    ) -> Mixture:
        """From plain numbers; weights need not be normalised, None is equal ones."""
        count = len(means)
        widths = [stds] * count if isinstance(stds, int | float) else list(stds)
        shares = torch.tensor(weights or [1.0] * count, dtype=torch.float64)
        return cls(
            torch.tensor(means, dtype=torch.float64),
            torch.tensor(widths, dtype=torch.float64),
            shares / shares.sum(),
        )

    @property
    def size(self) -> int:
        """D, numbers of one image."""
        return self.means.shape[1]

    def clean(self, x: Tensor, alpha: float | Tensor, s: float | Tensor) -> Tensor:
        """The mean of x0 [B, D] given ``x = alpha * x0 + s * noise`` [B, D]; differentiable.

        ``alpha`` and ``s``: numbers, or one for each row [B].
        """
        a, b = (torch.as_tensor(value, dtype=x.dtype).reshape(-1, 1) for value in (alpha, s))
        variance = (a * self.stds) ** 2 + b * b  # [B or 1, M]
        offset = x[:, None] - a[..., None] * self.means  # [B, M, D]
        logits = (
            self.weights.log()
            - 0.5 * self.size * variance.log()
            - 0.5 * offset.square().sum(-1) / variance
        )
        shrink = a * self.stds.square() / variance
        means = self.means + shrink[..., None] * offset
        return (logits.softmax(-1)[..., None] * means).sum(1)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Points [count, D] of the data itself."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        noise = torch.randn(count, self.size, dtype=torch.float64, generator=rng)
        return self.means[which] + self.stds[which, None] * noise


@dataclass(frozen=True, slots=True)
class Chain:
    """Noise levels and kernel: ``x = signal * x0 + noise * eps`` before each evaluation and at the
    end, ``count + 1`` levels of which the last is (1, 0)."""

    signal: tuple[float, ...]
    noise: tuple[float, ...]
    # share of fresh noise: 0 is the deterministic sampler, 1 DDPM's posterior variance
    eta: float = 1.0

    @classmethod
    def vp(cls, bars: Sequence[float], eta: float = 1.0) -> Chain:
        """From ``abar`` at each level, noisiest first; the clean end is added."""
        bars = (*bars, 1.0)
        return cls(tuple(map(math.sqrt, bars)), tuple(math.sqrt(1.0 - b) for b in bars), eta)

    @classmethod
    def flow(cls, sigmas: Sequence[float], eta: float = 1.0) -> Chain:
        """From the noise levels of a flow, 1 first; the clean end is added."""
        levels = (*sigmas, 0.0)
        return cls(tuple(1.0 - sigma for sigma in levels), levels, eta)

    @classmethod
    def of_steps(cls, count: int, eta: float = 1.0) -> Chain:
        """A variance-preserving chain of ``count`` evaluations: the cosine schedule."""
        angles = [math.pi / 2 * (1 - i / count) for i in range(count)]
        return cls.vp([max(math.cos(angle) ** 2, 1e-4) for angle in angles], eta)

    @property
    def count(self) -> int:
        """Evaluations of a trajectory."""
        return len(self.signal) - 1

    def std(self, step: int) -> float:
        """Standard deviation of the fresh noise of evaluation ``step``; 0 at the last."""
        a, a_next = self.signal[step : step + 2]
        s, s_next = self.noise[step : step + 2]
        variance = (s_next / s) ** 2 * (s * s - (a / a_next * s_next) ** 2)
        return self.eta * math.sqrt(max(variance, 0.0))

    def mean(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """Mean of the next state, from the state before evaluation ``step`` and its prediction."""
        eps = (x - self.signal[step] * x0) / self.noise[step]
        rest = math.sqrt(max(self.noise[step + 1] ** 2 - self.std(step) ** 2, 0.0))
        return self.signal[step + 1] * x0 + rest * eps

    def predict(self, model: Denoiser, x: Tensor, step: int) -> Tensor:
        """The denoiser: x0 predicted by evaluation ``step``."""
        return model.clean(x, self.signal[step], self.noise[step])


def gaussian_law(mixture: Mixture, chain: Chain) -> tuple[Tensor, float]:
    """Mean [D] and variance of x0 of the chain on a single Gaussian: closed form."""
    if len(mixture.means) != 1:
        raise ValueError(f"gaussian_law takes one Gaussian; got {len(mixture.means)}.")
    mean, variance = torch.zeros(mixture.size, dtype=torch.float64), 1.0
    ends = torch.tensor([[0.0] * mixture.size, [1.0] * mixture.size], dtype=torch.float64)
    for step in range(chain.count):
        base, one = chain.mean(ends, chain.predict(mixture, ends, step), step)
        slope = one - base  # the same in every direction: the step is linear
        mean = base + slope * mean
        variance = float(slope[0]) ** 2 * variance + chain.std(step) ** 2
    return mean, variance


def gaussian_evidence(mean: float, variance: float, centre: float, width: float) -> float:
    """``E exp(-(x - centre)^2 / (2 width^2))`` for ``x ~ N(mean, variance)``."""
    total = variance + width * width
    return width / math.sqrt(total) * math.exp(-0.5 * (mean - centre) ** 2 / total)


@dataclass(frozen=True)
class Exact:
    """The chain of a mixture in one dimension, tilted by a reward, on a grid.

    Transition densities are normalised on the grid, which is exact to rounding where the grid
    spacing is below a third of every step's noise.
    """

    mixture: Mixture
    chain: Chain
    reward: Function
    tilt: float = 1.0
    points: int = 1001
    reach: float = 8.0

    @cached_property
    def grid(self) -> Tensor:
        """[N, 1]"""
        return torch.linspace(-self.reach, self.reach, self.points, dtype=torch.float64)[:, None]

    def kernel(self, step: int) -> Tensor:
        """[N, N]: from each grid point the probabilities of the next."""
        mean = self.chain.mean(self.grid, self.chain.predict(self.mixture, self.grid, step), step)
        return _cells(mean[:, 0], self.chain.std(step), self.grid[:, 0])

    @cached_property
    def ends(self) -> Tensor:
        """[N, 1]: x0 that follows each point before the last evaluation, which adds no noise."""
        last = self.chain.count - 1
        return self.chain.mean(self.grid, self.chain.predict(self.mixture, self.grid, last), last)

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """``tilt * V`` [N] before each evaluation: log E exp(tilt * reward(x0)) from there on."""
        value = self.tilt * self.reward(self.ends)
        values = [value]
        for step in reversed(range(self.chain.count - 1)):
            value = torch.logsumexp(self.kernel(step).log() + value, dim=1)
            values.append(value)
        return tuple(reversed(values))

    @property
    def start(self) -> Tensor:
        """[N]: probabilities of pure noise."""
        return _cells(torch.zeros(1, dtype=torch.float64), 1.0, self.grid[:, 0])[0]

    @property
    def log_evidence(self) -> float:
        """log Z."""
        return float(torch.logsumexp(self.start.log() + self.values[0], dim=0))

    def law(self, tilted: bool = True) -> Tensor:
        """[N]: probabilities of the images ``ends``, tilted by the reward or as the model has
        them."""
        share = self.start
        for step in range(self.chain.count - 1):
            share = share @ self.kernel(step)
        if not tilted:
            return share
        return (share.log() + self.values[-1] - self.log_evidence).exp()

    def bins(self, edges: Tensor, tilted: bool = True) -> Tensor:
        """Probabilities of x0 in the bins between ``edges`` and in the two open ones, together
        ``len(edges) + 1``."""
        return binned(self.ends[:, 0], self.law(tilted), edges)


def binned(x: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """Weights of points by bin, as ``Exact.bins`` orders them; they are not normalised."""
    total = torch.zeros(len(edges) + 1, dtype=torch.float64)
    return total.index_add(0, torch.bucketize(x, edges), weights)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences of two laws."""
    return 0.5 * float((p - q).abs().sum())


def _cells(mean: Tensor, std: float, grid: Tensor) -> Tensor:
    """[len(mean), N]: a Gaussian's probabilities on the grid, each row sums to 1."""
    logits = -0.5 * ((grid - mean[:, None]) / std) ** 2
    return logits.softmax(dim=1)
