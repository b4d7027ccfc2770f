"""The Fréchet distance against closed forms and scipy's matrix root."""

import numpy as np
import pytest

from diffalign.eval.frechet import distance, frechet


def test_one_dimension_is_means_and_deviations():
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[5.0], [6.0], [10.0]])
    expected = (2.0 - 7.0) ** 2 + (np.std(a, ddof=1) - np.std(b, ddof=1)) ** 2
    assert distance(a, b) == pytest.approx(expected)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_against_the_matrix_root_of_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5))
    b = rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 0.5
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(first @ second).real
    means = a.mean(0) - b.mean(0)
    assert distance(a, b) == pytest.approx(means @ means + np.trace(first + second - 2 * root))


def test_interval_is_repeatable_and_the_distance_symmetric():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 1.0
    one = frechet(a, b, draws=50)
    assert one == frechet(a, b, draws=50)
    assert one.low < one.high
    assert one.distance == pytest.approx(frechet(b, a, draws=2).distance)
    with pytest.raises(ValueError, match=r"at least two images"):
        frechet(a[:1], b)
    with pytest.raises(ValueError, match=r"\[40, 3\] and \[40, 2\]"):
        frechet(a, b[:, :2])
