"""FIND: its gradient is that of the expected score, its law suits the prompt, its ratio stays in
its band."""

import math

import pytest
import torch
from scipy.stats import ttest_rel

from diffalign.noise_opt import FIND, NoisePolicy, RandomSearch
from diffalign.noise_opt.calibration import calibrate
from diffalign.noise_opt.policy import log_ratio, penalty_of, policy_gradient
from diffalign.testing.search import solve

START = NoisePolicy(torch.zeros(4), torch.ones(4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_that_of_the_expected_score():
    """R = a . x under N(mu, I): the gradient of E[R] in mu is a; here of the mean log ratio, so a
    over the number of values. Five standard errors of 200,000 draws."""
    a = torch.tensor([1.0, -2.0, 0.5, 3.0])
    noise = normal(200_000, 4)
    scores = noise.double() @ a.double()
    ours = policy_gradient(noise, scores, START, 0.99, (1.0, 0.0), "l2")[0]
    # Var(R x_i) = |a|^2 + a_i^2 for a linear score
    errors = ((a.square().sum() + a.square()) / len(noise)).sqrt() / 4
    assert ((ours - a / 4).abs() < 5 * errors).all()


def test_no_advantage_leaves_the_penalty_alone():
    policy = NoisePolicy(normal(6), 1 + 0.2 * normal(6, seed=1).abs())
    for kind in ("l2", "kl"):
        mean, std = (t.double().requires_grad_() for t in (policy.mean, policy.std))
        expected = torch.autograd.grad(-0.3 * penalty_of(mean, std, kind), (mean, std))
        ours = policy_gradient(normal(5, 6), torch.zeros(5), policy, 0.2, (10.0, 0.3), kind)
        torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_the_divergence_is_that_of_torch():
    mean, std = normal(7), 1 + 0.3 * normal(7, seed=1).abs()
    laws = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(*laws).mean()
    torch.testing.assert_close(penalty_of(mean, std, "kl"), expected)


def test_the_mean_log_ratio_stays_where_the_sum_does_not():
    """After the steps of a usual run, of 1e-3 for each value, at 16,384 values."""
    noise = normal(8, 16384) + 0.02
    mean, std = torch.full((16384,), 0.02), torch.full((16384,), 0.98)
    ratios = log_ratio(noise, mean, std)
    assert (ratios.exp() - 1).abs().max() < 0.2
    assert ((ratios * 16384).exp() - 1).abs().min() > 0.2
    expected = torch.distributions.Normal(mean, std).log_prob(noise) - torch.distributions.Normal(
        0.0, 1.0
    ).log_prob(noise)
    torch.testing.assert_close(ratios, expected.mean(1), rtol=1e-4, atol=1e-6)


def test_outside_the_band_there_is_no_gradient():
    policy = NoisePolicy(torch.full((4,), 3.0), torch.ones(4))
    ours = policy_gradient(torch.full((2, 4), 4.0), torch.ones(2), policy, 0.2, (1.0, 0.0), "l2")
    assert not ours.any()


TARGET = 0.4


def nearness(points):
    return -(points - TARGET).square().sum(1)


OPTIONS = {"iterations": 150, "rate": 5e-3, "draws": 20, "std": "fixed"}


@pytest.mark.slow
def test_fresh_draws_are_better_than_normal_noise(plain):
    """p < .01 over 20 seeds; the best of as many draws wins for a single image, as it should be."""
    fresh, usual, best, shifts = [], [], [], []
    for seed in range(20):
        problem, other = plain(nearness, seed=seed), plain(nearness, seed=seed)
        state, _ = solve(problem, FIND(**OPTIONS))
        policy = NoisePolicy.of(FIND().findings(state))
        draws = policy.draw(range(1000, 1050))
        fresh.append(float(nearness(draws).mean()))
        usual.append(float(nearness(normal(50, 16, seed=seed)).mean()))
        solve(other, RandomSearch(noises=problem.meter.rows))
        best.append(other.best.score)
        shifts.append(float(policy.mean.mean()))
    test = ttest_rel(fresh, usual)
    assert test.statistic > 0
    assert test.pvalue < 0.01
    assert 0.25 * TARGET < sum(shifts) / 20 < 1.5 * TARGET
    assert sum(best) / 20 > sum(fresh) / 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "learned"])
def test_other_calibrations_learn_too(plain, kind):
    options = {**OPTIONS, "iterations": 80, "rate": 1e-2}
    state, infos = solve(plain(nearness), FIND(calibration=kind, **options))
    assert state.point[0].mean() > 0.2 * TARGET
    assert infos[-1].values["score"] > infos[-1].values["first"]


def test_leave_one_out_is_by_hand():
    means, memory = calibrate("leave-one-out", torch.tensor([1.0, 2.0, 6.0]), torch.ones(2, 4), ())
    assert means.tolist() == [4.0, 3.5, 1.5]
    assert memory == ()


def test_the_mean_is_of_the_past():
    point = torch.ones(2, 4)
    means, memory = calibrate("mean", torch.tensor([2.0, 4.0]).double(), point, ())
    assert means.tolist() == [3.0, 3.0]
    means, memory = calibrate("mean", torch.tensor([9.0]).double(), point, memory)
    assert means.tolist() == [3.0]
    assert [float(value) for value in memory] == [15.0, 3.0]


@pytest.mark.slow
def test_calibration_reduces_the_variance_of_the_gradient():
    """Scores far from zero: their mean carries no information and much noise."""
    spread = {}
    for name in ("none", "leave-one-out"):
        rows = []
        for seed in range(200):
            noise = normal(8, 4, seed=seed)
            scores = noise[:, 0].double() + 10
            means = calibrate(name, scores, torch.ones(2, 4), ())[0] if name != "none" else 0.0
            rows.append(policy_gradient(noise, scores - means, START, 0.9, (1.0, 0.0), "l2")[0])
        spread[name] = torch.stack(rows).std(0).mean()
    assert spread["leave-one-out"] < 0.3 * spread["none"]


def test_the_learned_calibration_predicts_the_score(monkeypatch):
    """A score that stands still: the network comes to it."""
    monkeypatch.setattr("diffalign.noise_opt.calibration.RATE", 1e-3)
    memory, point, means = (), torch.stack([torch.zeros(4), torch.ones(4)]), None
    for _ in range(40):
        means, memory = calibrate("learned", torch.full((2,), 0.7).double(), point, memory)
    assert float(means[0]) == pytest.approx(0.7, abs=0.05)
    assert all(isinstance(tensor, torch.Tensor) for tensor in memory)


def test_deviations_stay_where_they_are_told_to(plain):
    state, _ = solve(plain(nearness), FIND(std="fixed", iterations=20, rate=0.05))
    assert torch.equal(state.point[1], torch.ones(16))
    state, _ = solve(plain(lambda p: -100 * p.square().sum(1)), FIND(iterations=80, rate=0.05))
    assert 0.99e-4 < float(state.point[1].min()) < 1.0


def test_norms_of_draws():
    """E|x|^2 = |mu|^2 + |std|^2; projected draws have norm sqrt(d)."""
    policy = NoisePolicy(0.3 * normal(400), 0.8 + 0.1 * normal(400, seed=1).abs())
    draws = policy.draw(range(400))
    mean = float(draws.square().sum(1).mean())
    assert mean == pytest.approx(400 * policy.norm**2, rel=5 * math.sqrt(2 / 400 / 400))
    norms = policy.draw([1, 2], project=True).norm(dim=1)
    assert norms.tolist() == pytest.approx([20.0, 20.0])


def test_a_law_off_the_shell_is_reported(plain, monkeypatch):
    monkeypatch.setattr("diffalign.core.errors._WARNED", set())
    with pytest.warns(UserWarning, match="times the norm of normal noise"):
        solve(plain(lambda p: p.square().sum(1)), FIND(iterations=60, rate=0.05))


def test_equal_seeds_give_equal_laws(plain):
    points = [solve(plain(nearness, seed=3), FIND(iterations=5))[0].point for _ in range(2)]
    assert torch.equal(*points)


def test_cost_and_bad_options(plain):
    problem = plain(nearness, differentiable=False)
    _, infos = solve(problem, FIND(iterations=6, batch=3, draws=5))
    assert problem.meter.rows == 6 * 3 + 5
    assert problem.meter.backward == 0
    assert len(infos) == 7
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        FIND(batch=1)
    assert FIND(batch=1, calibration="mean").batch == 1
