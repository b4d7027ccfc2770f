"""Whether noise looks like independent normal values: the statistics and the regulariser of DNO.

Tang et al. 2024, "Tuning-free alignment of diffusion models with direct noise optimization",
arXiv:2405.18881. The values are written as n rows of 4. Of normal noise the mean row is near zero
and the mean outer product near the identity, in the order given and in any other; both have a
bound on their probability. The norm alone is one degree of freedom of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WIDTH = 4
PERMUTATIONS = 100
# permutations that the test averages over, rows and noises of the simulation of its limits
TRIED, ROWS, SIMULATED = 32, 256, 1000
# standard deviations of the norm that pass
REACH = 4.0
# numbers permuted at once
CHUNK = 1 << 22


def log_p(noise: Tensor, rng: torch.Generator, permutations: int = PERMUTATIONS) -> Tensor:
    """Log of DNO's bounds on the probability of noise [B, ...], [B] in float64; differentiable.

    With ``M1 = |mean row|`` and ``M2 = |rows' rows / n - I|``: ``-n M1^2 / 8`` and ``-n max(sqrt(1
    + M2) - 1 - sqrt(4 / n), 0)^2 / 2``, each at most ``-log 2``, where the bound says nothing; and
    the mean of both over random orders of the values. At its largest it is ``-4 log 2``.
    Cost: ``permutations`` times the size of the noise.
    Raises: ValueError for noise of fewer than 16 values.
    """
    rows = [sum(_terms(row, rng, permutations)) for row in values_of(noise)]
    return torch.stack([torch.as_tensor(row) for row in rows])


def log_p_gradient(noise: Tensor, rng: torch.Generator, permutations: int = PERMUTATIONS) -> Tensor:
    """Gradient of ``log_p`` in the noise [B, ...], float32."""
    gradient = torch.zeros(len(noise), noise[0].numel(), dtype=torch.float64)
    for row, values in enumerate(values_of(noise.detach())):
        leaf = values.clone().requires_grad_()
        with torch.enable_grad():
            for term in _terms(leaf, rng, permutations):
                gradient[row, : len(leaf)] += torch.autograd.grad(term, leaf)[0]
    return gradient.view(noise.shape).to(noise.device, torch.float32)


@dataclass(frozen=True, slots=True)
class Normality:
    """How normal one noise is. ``normal`` is the verdict."""

    # standard deviations of the norm from its mode
    norm: float
    # sqrt(n) M1 and sqrt(n) M2 of the values in their order
    mean: float
    covariance: float
    # the same, mean over random orders
    permuted_mean: float
    permuted_covariance: float
    # rows of the noise
    rows: int

    @classmethod
    def of(cls, noise: Tensor, seed: int = 0) -> Normality:
        """Of one noise [...], with random orders from ``seed``."""
        (values,) = values_of(noise[None])
        d = noise.numel()
        # the norm's standard deviation is close to 1 / sqrt(2)
        norm = (float(noise.double().norm()) - math.sqrt(d - 1)) * math.sqrt(2)
        rng = torch.Generator().manual_seed(seed)
        mean, covariance, mixed, mixed_covariance = _statistics(values[None], rng)[0].tolist()
        rows = len(values) // WIDTH
        return cls(norm, mean, covariance, mixed, mixed_covariance, rows)

    @property
    def normal(self) -> bool:
        """Whether the norm is within 4 standard deviations and each statistic below what 99% of
        normal noise has."""
        numbers = (self.mean, self.covariance, self.permuted_mean, self.permuted_covariance)
        limits = limits_of(min(self.rows, ROWS))
        return abs(self.norm) <= REACH and all(x <= top for x, top in zip(numbers, limits))


@cache
def limits_of(rows: int) -> tuple[float, ...]:
    """99% points of the four statistics of normal noise with so many rows, simulated once.

    They are multiplied by ``sqrt(n)``, so those of 256 rows serve for more.
    """
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(SIMULATED, rows * WIDTH, generator=rng, dtype=torch.float64)
    points: list[float] = _statistics(noise, rng).quantile(0.99, dim=0).tolist()
    return tuple(points)


def values_of(noise: Tensor) -> Tensor:
    """Noise [B, ...] as [B, 4 n] on the CPU in float64; up to three last values are left out."""
    size = noise[0].numel() // WIDTH * WIDTH
    if size < 16:
        raise ValueError(
            f"The statistics of noise need at least 16 values; got {list(noise.shape[1:])}."
        )
    return noise.to("cpu", torch.float64).flatten(1)[:, :size]


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """``M1^2`` and ``M2`` [...] of values [..., 4 n]."""
    rows = values.reshape(*values.shape[:-1], -1, WIDTH)
    product = rows.mT @ rows / rows.shape[-2] - torch.eye(WIDTH, dtype=values.dtype)
    return rows.mean(-2).square().sum(-1), torch.linalg.eigvalsh(product).abs().amax(-1)


def _bound(values: Tensor) -> Tensor:
    """The sum of both log bounds [...] of values [..., 4 n]."""
    n = values.shape[-1] // WIDTH
    mean, covariance = moments(values)
    excess = ((1 + covariance).sqrt() - 1 - math.sqrt(WIDTH / n)).clamp(min=0)
    bounds = (-n * mean / (2 * WIDTH), -n * excess.square() / 2)
    first, second = (bound.clamp(max=-math.log(2)) for bound in bounds)
    return first + second


def _orders(size: int, count: int, rng: torch.Generator) -> list[Tensor]:
    """Random orders [K, size] of all ``count``, as many at once as the memory likes."""
    each = max(1, CHUNK // size)
    parts = [min(each, count - first) for first in range(0, count, each)]
    return [torch.rand(part, size, generator=rng).argsort(dim=1) for part in parts]


def _terms(values: Tensor, rng: torch.Generator, permutations: int) -> Iterator[Tensor]:
    """Numbers whose sum is ``log_p`` of values [4 n]."""
    yield _bound(values)
    for orders in _orders(len(values), permutations, rng):
        yield _bound(values[orders]).sum() / permutations


def _statistics(noise: Tensor, rng: torch.Generator) -> Tensor:
    """The four statistics [N, 4] of values [N, 4 n]."""
    n = noise.shape[1] // WIDTH
    mean, covariance = moments(noise)
    plain = torch.stack([mean.sqrt(), covariance], -1)
    mixed = torch.zeros_like(plain)
    for orders in _orders(noise.shape[1], TRIED, rng):
        for order in orders:
            mean, covariance = moments(noise[:, order])
            mixed += torch.stack([mean.sqrt(), covariance], -1) / TRIED
    return torch.cat([plain, mixed], -1) * math.sqrt(n)
