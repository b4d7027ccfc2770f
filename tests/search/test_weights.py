"""Weights in log space and resampling."""

import math

import pytest
import torch

from diffalign.search.weights import Weighted, ancestors, effective_size, log_mean_exp


def test_sums_by_hand():
    values = torch.tensor([[0.0, math.log(3.0)], [1000.0, 1000.0]], dtype=torch.float64)
    assert log_mean_exp(values).tolist() == pytest.approx([math.log(2.0), 1000.0])
    # (1 + 3)^2 / (1 + 9)
    assert effective_size(values).tolist() == pytest.approx([1.6, 2.0])


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_resampling_is_unbiased(scheme):
    """Each particle is copied K w times on average: 4,000 rows, 5 standard errors."""
    shares = torch.tensor([0.45, 0.3, 0.15, 0.1], dtype=torch.float64)
    log_weights = (shares.log() + 12.0).expand(4000, 4)
    drawn = ancestors(log_weights, scheme, torch.Generator().manual_seed(0))
    counts = torch.stack([(drawn == k).sum(1) for k in range(4)], 1).double()
    errors = counts.std(0) / 4000**0.5 + 1e-12
    assert bool(((counts.mean(0) - 4 * shares).abs() <= 5 * errors + 1e-9).all())
    assert drawn.shape == (4000, 4)
    if scheme == "systematic":  # K w or its neighbours, never less or more
        assert bool((counts >= (4 * shares).floor()).all())
        assert bool((counts <= (4 * shares).ceil()).all())
    # copies of the second, K w = 1.2: 1 or 2 with systematic, binomial with multinomial
    variance = float(counts[:, 1].var())
    if scheme == "multinomial":
        assert variance == pytest.approx(4 * 0.3 * 0.7, rel=5 * (2 / 4000) ** 0.5)
    else:
        assert variance < 0.5 * 4 * 0.3 * 0.7
    if scheme == "systematic":
        assert variance == pytest.approx(0.2 * 0.8, rel=0.15)


def test_particles_without_weight_are_never_copied():
    log_weights = torch.tensor([[-math.inf, 0.0, -math.inf, -800.0]], dtype=torch.float64)
    for scheme in ("systematic", "stratified", "multinomial"):
        drawn = ancestors(log_weights, scheme, torch.Generator().manual_seed(1))
        assert drawn.tolist() == [[1, 1, 1, 1]], scheme


def test_weighted_images_by_hand():
    weighted = Weighted(
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([0.0, math.log(3.0)], dtype=torch.float64),
        math.log(2.0),
    )
    assert weighted.mean() == pytest.approx(1.75)
    assert weighted.effective == pytest.approx(1.6)
    picks = weighted.pick(4000, torch.Generator().manual_seed(2))
    assert sum(picks) / 4000 == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 4000) ** 0.5)
