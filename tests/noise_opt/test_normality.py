"""DNO's statistics against a slow version, hand-worked numbers and laws that are known."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from diffalign.noise_opt.normality import (
    Normality,
    limits_of,
    log_p,
    log_p_gradient,
    moments,
)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def slow(values):
    """Both bounds of one order, written out with numpy."""
    rows = np.asarray(values).reshape(-1, 4)
    n = len(rows)
    first = np.linalg.norm(rows.mean(0))
    second = np.linalg.norm(rows.T @ rows / n - np.eye(4), 2)
    bounds = (
        -n * first**2 / 8,
        -n * max(math.sqrt(1 + second) - 1 - math.sqrt(4 / n), 0.0) ** 2 / 2,
    )
    return sum(min(bound, -math.log(2)) for bound in bounds)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
def test_the_bounds_are_the_published_formula(scale):
    """Without permutations the second term is left out."""
    noise = scale * normal(2, 3, 4, 8) + 0.2
    rng = torch.Generator().manual_seed(0)
    ours = log_p(noise, rng, permutations=1)
    rng = torch.Generator().manual_seed(0)
    for row in range(2):
        order = torch.rand(1, 96, generator=rng).argsort(dim=1)[0]
        flat = noise[row].flatten()
        expected = slow(flat) + slow(flat[order])
        assert float(ours[row]) == pytest.approx(expected, rel=1e-9)


def test_numbers_by_hand():
    """Four rows of ones: the mean row is (1, 1, 1, 1), the mean product all ones, whose spectrum is
    4, 0, 0, 0; without the identity 3, -1, -1, -1."""
    mean, covariance = moments(torch.ones(1, 16, dtype=torch.float64))
    assert float(mean) == pytest.approx(4.0)
    assert float(covariance) == pytest.approx(3.0)
    total = log_p(torch.ones(1, 16), torch.Generator().manual_seed(0), permutations=3)
    # -4 * 4 / 8, and sqrt(4) - 1 - sqrt(4 / 4) = 0; every order is the same
    assert float(total) == pytest.approx(2 * (-2.0 - math.log(2)))


def test_the_gradient_is_that_of_central_differences():
    noise = 1.3 * normal(1, 4, 8) + 0.3

    def value(x):
        return float(log_p(x, torch.Generator().manual_seed(1), permutations=5))

    gradient = log_p_gradient(noise, torch.Generator().manual_seed(1), permutations=5).double()
    for seed in range(8):
        direction = normal(1, 4, 8, seed=10 + seed)
        slope = (value(noise + 1e-4 * direction) - value(noise - 1e-4 * direction)) / 2e-4
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_the_limit_of_the_mean_is_that_of_its_law():
    """n M1^2 of normal noise is chi squared with 4 degrees of freedom; a quantile of 1000 draws at
    99% has a standard error of ``sqrt(p q / N) / f``."""
    law = chi2(4)
    point = math.sqrt(law.ppf(0.99))
    density = law.pdf(point**2) * 2 * point
    error = math.sqrt(0.01 * 0.99 / 1000) / density
    assert limits_of(256)[0] == pytest.approx(point, abs=5 * error)


def test_normal_noise_passes_and_other_noise_on_the_shell_does_not():
    noises = normal(60, 4, 8, 8).float()
    # three statistics at 99% and their permuted means: 95% or more pass
    assert sum(Normality.of(noise).normal for noise in noises) >= 53
    noise = noises[0]
    shell = noise.norm()
    flat = torch.ones_like(noise) * shell / 16
    repeated = noise[:1].repeat(4, 1, 1)
    rows = noise.clone()
    rows[..., 0::4] *= 1.5
    for other in (flat, repeated + 0.35, rows, 1.3 * noise):
        assert not Normality.of(other).normal
    assert abs(Normality.of(flat).norm) < 1.0


def test_too_little_noise_is_refused():
    with pytest.raises(ValueError, match="at least 16 values"):
        log_p(torch.zeros(1, 3), torch.Generator())
