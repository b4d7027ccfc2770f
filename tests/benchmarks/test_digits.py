"""The digits benchmark's measures, and that a run is read back instead of repeated."""

import argparse
import json

import pytest
import torch


@pytest.fixture(scope="module")
def digits(benchmark_module):
    return benchmark_module("digits")


def test_distance_of_gaussians_by_hand(digits):
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances; 0 for equal ones."""
    one = (torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double())
    two = (torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 9.0])).double())
    assert digits.frechet(one, two) == pytest.approx(9 + 1 + 4)
    assert digits.frechet(one, one) == pytest.approx(0.0, abs=1e-9)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    turned = [(mean @ turn.T, turn @ cov @ turn.T) for mean, cov in (one, two)]
    assert digits.frechet(*turned) == pytest.approx(14.0)


def test_weighted_moments_are_those_of_copies(digits):
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    weighted = digits.moments(x, torch.tensor([0.25, 0.75]))
    copies = x[[0, 1, 1, 1]].double()
    assert torch.allclose(weighted[0], copies.mean(0))
    assert torch.allclose(weighted[1], torch.cov(copies.T, correction=0))


def test_data_and_targets(digits):
    data = digits.digits()
    assert (len(data.train), len(data.held_out)) == (1198, 599)
    assert data.train.min() == -1
    assert data.train.max() == 1
    assert set(digits.TARGETS["even"]) | set(digits.TARGETS["odd"]) == set(range(10))


@pytest.mark.slow
def test_every_method_spends_its_budget_and_is_read_back(digits, tmp_path):
    """An untrained net: 3 trajectories of 20 steps a method, weights that sum to 1."""
    torch.manual_seed(0)
    data = digits.digits()
    options = argparse.Namespace(work=str(tmp_path), targets=["3", "odd"], seeds=1)
    model, classifier, facts = digits.trained(data, tmp_path, steps=1)
    assert facts["accuracy"] > 0.9
    lab = digits.Lab(model, classifier, data, options)
    for method in digits.METHODS:
        run = lab.run("odd", method, 200, 0)
        assert 100 < run["NFE"] <= 200, method
        assert run["distance"] > 0
        assert len(run["images"]) == 12
    again = json.loads(next(tmp_path.glob("200/odd-TDS-0.json")).read_text())
    assert lab.run("odd", "TDS", 200, 0) == again
    for target in options.targets:
        for method in digits.METHODS:
            lab.run(target, method, 200, 0)
    assert digits.row_of(lab, "TDS", "one digit", 200)["entropy"] is None
    assert digits.row_of(lab, "TDS", "even, odd", 200)["distance"] == again["distance"]
    assert digits.sheet(lab, 200).width > 1000
