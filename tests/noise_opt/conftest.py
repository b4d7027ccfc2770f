"""Toy problems: the image is the start noise itself, or a point of two Gaussians."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Identity:
    """A generator whose image is its noise."""

    size: int

    def clean(self, x, alpha, s):
        return x


@pytest.fixture
def plain():
    """``plain(reward, size, seed=, **limits)``: the image is the noise, one NFE each."""
    from diffalign.core import Budget, Meter
    from diffalign.testing.mixtures import Chain
    from diffalign.testing.search import toy

    def make(function, size=16, seed=0, differentiable=True, **limits):
        meter = Meter(Budget(**limits))
        chain = Chain.of_steps(1, 0.0)
        model = Identity(size)
        return toy(
            model, function, chain=chain, budget=meter, seed=seed, differentiable=differentiable
        )

    return make


@pytest.fixture
def plane():
    """``plane(reward, steps, seed=)``: two Gaussians in 16 dimensions, without noise in steps."""
    import torch

    from diffalign.core import Budget, Meter
    from diffalign.testing.mixtures import Chain, Mixture
    from diffalign.testing.search import toy

    means = torch.zeros(2, 16, dtype=torch.float64)
    means[0, 0], means[1, 0] = -2.0, 2.0
    mixture = Mixture.of(means.tolist(), 0.5)

    def make(function, steps=2, seed=0, **limits):
        meter = Meter(Budget(**limits))
        chain = Chain.of_steps(steps, 0.0)
        return toy(mixture, function, chain=chain, budget=meter, seed=seed)

    return make
