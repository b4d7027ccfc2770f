"""Random search is best-of-N: the same seeds, the same images, the same cost."""

import torch

from diffalign.noise_opt import RandomSearch
from diffalign.search import BestOfN
from diffalign.testing.search import solve


def rising(points):
    return points.sum(1)


def test_it_is_best_of_n(plain):
    problem, other = plain(rising), plain(rising)
    solve(problem, RandomSearch(noises=10))
    solve(other, BestOfN(10))
    assert torch.equal(problem.best.image, other.best.image)
    assert problem.best.lineage == other.best.lineage
    assert problem.meter.rows == other.meter.rows == 10


def test_a_budget_ends_it(plain):
    problem = plain(rising, nfe=6)
    state, _ = solve(problem, RandomSearch(noises=10))
    assert problem.meter.rows == 6
    assert state == 4
