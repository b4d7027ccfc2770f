"""The oracles themselves: closed forms against integrals, draws and each other."""

import math

import pytest
import torch

from diffalign.testing.mixtures import (
    Chain,
    Exact,
    Mixture,
    binned,
    gaussian_evidence,
    gaussian_law,
    total_variation,
)
from diffalign.testing.search import points_of, toy

TWO = Mixture.of([[-2.0], [1.5]], [0.4, 0.3], [0.7, 0.3])
ONE = Mixture.of([[0.7]], 0.5)


def reward(x):
    return 1.5 * torch.tanh(x[:, 0])


@pytest.mark.parametrize(("alpha", "s"), [(0.3, 0.95), (0.8, 0.2), (0.0, 1.0)])
def test_clean_is_the_posterior_mean(alpha, s):
    """Bayes' rule by brute force on a fine grid of x0."""
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = sum(
        w * torch.exp(-0.5 * ((grid - m) / d) ** 2) / d
        for m, d, w in zip(TWO.means[:, 0], TWO.stds, TWO.weights)
    )
    x = torch.tensor([[-1.3], [0.2], [2.5]], dtype=torch.float64)
    weight = density * torch.exp(-0.5 * ((x - alpha * grid) / s) ** 2)
    expected = (weight * grid).sum(1) / weight.sum(1)
    assert torch.allclose(TWO.clean(x, alpha, s)[:, 0], expected, atol=1e-9)


def test_clean_in_two_dimensions_is_that_of_each_for_a_product():
    """A single Gaussian factorises; a row may have its own noise level."""
    wide = Mixture.of([[0.7, -1.0]], 0.5)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    s = (1 - alpha**2).sqrt()
    apart = torch.stack(
        [
            Mixture.of([[m]], 0.5).clean(x[:, i : i + 1], alpha, s)[:, 0]
            for i, m in enumerate((0.7, -1.0))
        ],
        1,
    )
    assert torch.allclose(wide.clean(x, alpha, s), apart, atol=1e-12)


def test_eta_kernel_is_ddim():
    """Mean and noise of one step, from the scheduler's own formula of diffusers."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    bars = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    x = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for eta in (0.0, 0.4, 1.0):
        chain = Chain.vp(bars, eta)
        for step, t in enumerate(scheduler.timesteps):
            x0 = chain.predict(TWO, x, step)
            eps = (x - chain.signal[step] * x0) / chain.noise[step]
            ours = chain.mean(x, x0, step) + chain.std(step) * noise
            theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise if eta else None)
            # its tables are float32
            assert torch.allclose(ours, theirs.prev_sample, atol=2e-6)


def test_eta_kernel_on_a_flow_is_euler_without_noise():
    chain = Chain.flow([1.0, 0.7, 0.3], eta=0.0)
    x = torch.tensor([[0.4], [-1.0]], dtype=torch.float64)
    x0 = chain.predict(TWO, x, 1)
    velocity = (x - x0) / 0.7  # eps - x0 with eps = (x - 0.3 x0) / 0.7
    assert torch.allclose(chain.mean(x, x0, 1), x + (0.3 - 0.7) * velocity, atol=1e-12)
    first = Chain.flow([1.0, 0.7], eta=1.0)
    assert first.std(0) == pytest.approx(0.7)  # the start noise is thrown away


def test_table_of_marginals():
    """Output variance of N(0, 1) data on a flow with a uniform grid: the published table."""
    unit = Mixture.of([[0.0]], 1.0)
    for steps, ode, eta in ((4, 0.518, 0.392), (10, 0.773, 0.648), (28, 0.912, 0.845)):
        sigmas = [1 - i / steps for i in range(steps)]
        for kernel, variance in ((0.0, ode), (1.0, eta)):
            _, v = gaussian_law(unit, Chain.flow(sigmas, kernel))
            assert v == pytest.approx(variance, abs=6e-4), (steps, kernel)


@pytest.mark.parametrize("chain", [Chain.of_steps(6), Chain.flow([1.0, 0.8, 0.5, 0.2])])
def test_grid_agrees_with_the_closed_form_of_a_gaussian(chain):
    def quadratic(x):
        return -((x[:, 0] - 2.0) ** 2) / (2 * 0.5**2)

    exact = Exact(ONE, chain, quadratic)
    mean, variance = gaussian_law(ONE, chain)
    expected = gaussian_evidence(float(mean[0]), variance, 2.0, 0.5)
    assert math.exp(exact.log_evidence) == pytest.approx(expected, rel=1e-5)
    law, ends = exact.law(), exact.ends[:, 0]
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
    tilted = (variance * 2.0 + 0.25 * float(mean[0])) / (variance + 0.25)  # two Gaussians' product
    assert float((law * ends).sum()) == pytest.approx(tilted, rel=1e-5)


def test_the_discretised_chain_is_not_the_data():
    """Card section 2.6: five steps give variance 0.494 instead of 1, and Z = 0.0394."""
    unit, chain = Mixture.of([[0.0]], 1.0), Chain.vp([0.01, 0.1, 0.3, 0.6, 0.9])
    mean, variance = gaussian_law(unit, chain)
    assert variance == pytest.approx(0.494, abs=5e-4)
    assert gaussian_evidence(float(mean[0]), variance, 2.0, 0.5) == pytest.approx(0.0394, abs=5e-5)


def test_grid_agrees_with_draws_of_two_modes():
    """20,000 draws: log Z within 4 standard errors, the histogram within its own noise."""
    chain = Chain.of_steps(6)
    exact = Exact(TWO, chain, reward)
    problem = toy(TWO, reward, chain=chain)
    x = problem.run(problem.start(problem.seeds(20000))).latents
    weights = reward(x).exp()
    error = float(weights.std() / 20000**0.5)
    assert abs(float(weights.mean()) - math.exp(exact.log_evidence)) < 4 * error
    edges = torch.linspace(-4, 4, 21, dtype=torch.float64)
    for law, share in ((False, torch.ones(20000)), (True, weights)):
        histogram = binned(x[:, 0], share.double() / share.sum(), edges)
        # 22 bins of 20,000 (weighted: about 9,000 effective) draws: expected below 0.02
        assert total_variation(histogram, exact.bins(edges, tilted=law)) < 0.02


def test_values_are_martingales():
    """The value before the first step, averaged over noise, is Z; a drift-free reward is flat."""
    exact = Exact(TWO, Chain.of_steps(5), lambda x: torch.full_like(x[:, 0], 0.3), tilt=2.0)
    assert all(torch.allclose(v, torch.full_like(v, 0.6), atol=1e-9) for v in exact.values)


# -- the toy problem ------------------------------------------------------------------------------


def test_rows_of_the_toy_do_not_depend_on_their_batch():
    problem = toy(TWO, reward, chain=5)
    seeds = problem.seeds(4)
    together = problem.run(problem.start(seeds)).latents
    alone = torch.cat([problem.run(problem.start([seed])).latents for seed in seeds])
    assert torch.equal(together, alone)
    middle = problem.run(problem.start(seeds), 2)
    assert torch.equal(problem.run(middle).latents, together)
    assert torch.equal(problem.run(middle.select([2])).latents, together[2:3])
    children = middle.select([0, 0]).reseed([7, 8])
    ends = problem.run(children).latents
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(problem.run(children).latents, ends)


def test_renoise_keeps_the_marginal():
    """Gaussian data: forward from step 4 to step 1 has the variance of step 1."""
    chain = Chain.of_steps(8)
    problem = toy(Mixture.of([[0.0]], 1.0), reward, chain=chain)
    state = problem.run(problem.start(problem.seeds(20000)), 5)
    back = problem.sampler.renoise(state, 1, problem.seeds(20000))
    ratio = (chain.signal[1] / chain.signal[5]) ** 2
    expected = ratio * (float(state.latents.var()) - chain.noise[5] ** 2) + chain.noise[1] ** 2
    assert float(back.latents.var()) == pytest.approx(expected, rel=5 * (2 / 20000) ** 0.5)


def test_twist_is_a_gradient_by_differences():
    problem = toy(TWO, reward, chain=6)
    state = problem.run(problem.start([1, 2, 3]), 3)
    value, gradient = problem.twist(state)
    x0 = problem.sampler.chain.predict(TWO, state.latents, 3)
    assert torch.allclose(value, reward(x0))
    h = 1e-6
    shifted = [
        reward(problem.sampler.chain.predict(TWO, state.latents + sign * h, 3)) for sign in (1, -1)
    ]
    assert torch.allclose(gradient[:, 0], (shifted[0] - shifted[1]) / (2 * h), atol=1e-7)


def test_images_show_points():
    problem = toy(Mixture.of([[0.5, -1.0]], 0.2), lambda x: x.sum(1), chain=4)
    state = problem.run(problem.start([3]))
    images = problem.decode(state)
    assert images.shape == (1, 3, 1, 2)
    assert torch.allclose(points_of(images), state.latents, atol=1e-12)
