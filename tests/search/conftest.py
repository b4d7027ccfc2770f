"""Toy problems of the search tests: two Gaussians in the plane, and scores that do not care."""

import pytest


def near(points):
    """Minus the squared distance to a point off both Gaussians."""
    return -(points - points.new_tensor([2.5, 1.5])).square().sum(1)


@pytest.fixture
def plane():
    """``plane(steps, eta, nfe=..., seed=...)``: a problem in the plane."""
    from diffalign.core import Budget, Meter
    from diffalign.testing.mixtures import Chain, Mixture
    from diffalign.testing.search import toy

    mixture = Mixture.of([[-2.0, 0.0], [2.0, 1.0]], 0.5)

    def make(steps=10, eta=1.0, function=near, reserve=0, seed=0, model=mixture, **limits):
        meter = Meter(Budget(**limits))
        chain = Chain.of_steps(steps, eta)
        return toy(model, function, chain=chain, budget=meter, seed=seed, reserve=reserve)

    return make


class Counting:
    """Scores that follow from the number of the image, not from the image."""

    def __init__(self, rule):
        self.rule, self.count = rule, 0

    def __call__(self, points):
        import torch

        numbers = range(self.count, self.count + len(points))
        self.count += len(points)
        return torch.tensor([float(self.rule(n)) for n in numbers], dtype=torch.float64)


@pytest.fixture
def counting():
    """``counting(rule)``: a reward whose n-th score is ``rule(n)``, whatever the image."""
    return Counting
