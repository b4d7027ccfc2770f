"""Kernels: the marginals of the published table, the schedulers' own steps, and branching."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffalign as da
from diffalign.seams.denoiser.space import Parametrisation
from diffalign.seams.trajectory.grid import Grid
from diffalign.seams.trajectory.kernels import Eta, FlowSDE, VPFlow, path_levels, path_time

SD, SDXL, SD3, FLUX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
)


def uniform(steps):
    """A flow model's uniform grid."""
    levels = tuple(1 - i / steps for i in range(steps + 1))
    return Grid(
        scheduler="FlowMatchEulerDiscreteScheduler",
        parametrisation=Parametrisation("flow"),
        timesteps=levels[:-1],
        sigmas=levels[:-1],
        following=levels[1:],
        order=1,
        unscaled=False,
        initial=1.0,
        clip=None,
        draws=False,
    )


def variance(kernel, steps):
    """Variance of the samples for N(0, 1) data and the exact velocity; 1 would be exact.

    Then ``x0 = (1 - sigma) x / d`` and ``eps = sigma x / d`` with ``d = (1 - sigma)^2 + sigma^2``.
    """
    grid, value = uniform(steps), 1.0
    for i, sigma in enumerate(grid.sigmas):
        p, q, std = kernel.coefficients(grid, i)
        d = (1 - sigma) ** 2 + sigma**2
        value = ((p * (1 - sigma) + q * sigma) / d) ** 2 * value + std**2
    return value


STEPS = (4, 10, 28, 50, 200, 2000)
# computed independently, to three decimals
TABLE = (
    (Eta(1.0), (0.392, 0.648, 0.845, 0.907, 0.975, 0.997)),
    (Eta(0.0), (0.518, 0.773, 0.912, 0.950, 0.987, 0.999)),
    (FlowSDE("s2"), (0.618, 0.807, 0.924, 0.956, 0.989, 0.999)),
    # the table's last step draws noise and ours does not, which shows at 4 steps (1.091 there)
    (FlowSDE("3s2"), (1.095, 0.986, 0.986, 0.991, 0.997, 1.000)),
)


@pytest.mark.parametrize(("kernel", "expected"), TABLE, ids=lambda k: repr(k)[:16])
def test_the_marginals_of_the_table(kernel, expected):
    for steps, value in zip(STEPS, expected):
        assert variance(kernel, steps) == pytest.approx(value, abs=6e-4), steps


@pytest.mark.parametrize("kernel", [VPFlow(), FlowSDE(0.7), VPFlow("none")], ids=repr)
def test_other_kernels_come_to_the_marginals_as_steps_shrink(kernel):
    errors = [abs(variance(kernel, steps) - 1) for steps in (4, 500, 50_000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.5e-3


def test_the_stochastic_mode_of_the_flow_scheduler_never_does():
    """The negative control: it tends to a variance of 1/2."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(200)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20_000, generator=rng)
    for i, time in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        d = (1 - sigma) ** 2 + sigma**2
        x = scheduler.step((2 * sigma - 1) / d * x, time, x, generator=rng)[0]
    # 5 standard errors of a variance
    assert float(x.var()) == pytest.approx(0.489, abs=5 * 0.489 * math.sqrt(2 / 20_000))


def test_the_time_of_the_variance_preserving_path():
    for sigma in (0.01, 0.3, 0.9, 0.99):
        signal, noise = path_levels(path_time(sigma))
        assert noise / (signal + noise) == pytest.approx(sigma)
        assert signal**2 + noise**2 == pytest.approx(1)


def ends(sampler, cut=None):
    with sampler:
        state = sampler.start([1, 2])
        return sampler.run(state if cut is None else sampler.run(state, cut)).latents


NATIVE = (
    (SD, "DDIMScheduler", Eta(0.6), {"eta": 0.6}),
    (SDXL, "EulerAncestralDiscreteScheduler", Eta(1.0), {}),
    (SD3, None, Eta(0.0), {}),
    (SD, "DDIMScheduler", Eta(0.0), {}),
    (SD, "DDIMScheduler", Eta(1.0), {"eta": 1.0}),
    (SDXL, "EulerDiscreteScheduler", Eta(0.0), {}),
    (FLUX, None, FlowSDE(0.0), {}),
    (SD3, None, VPFlow("none"), {}),
)


@pytest.mark.parametrize(
    ("name", "scheduler", "kernel", "call"),
    [*NATIVE[:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in NATIVE[3:])],
    ids=repr,
)
@pytest.mark.few(1)
def test_where_a_scheduler_makes_the_same_step(sampler_for, name, scheduler, kernel, call):
    """To rounding, noise included: both draw it from each image's generator."""
    native = ends(sampler_for(name, da.CFG(3.0), scheduler=scheduler, **call))
    ours = ends(sampler_for(name, da.CFG(3.0), scheduler=scheduler, kernel=kernel))
    size = float(native.abs().max())
    torch.testing.assert_close(ours, native, rtol=0, atol=2e-5 * size)


KERNELS = (
    (SDXL, Eta(1.0)),
    (FLUX, FlowSDE()),
    (SDXL, Eta(0.5)),
    (SD3, Eta(1.0)),
    (SD3, FlowSDE("s2")),
    (FLUX, FlowSDE(0.7)),
    (SD3, VPFlow()),
)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*KERNELS[:2], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in KERNELS[2:])],
    ids=repr,
)
@pytest.mark.slow
def test_children_of_one_state_differ_and_cuts_do_not_show(sampler_for, name, kernel):
    sampler = sampler_for(name, da.APG(3.0, cap=5.0, momentum=-0.5), kernel=kernel, steps=3)
    assert sampler.branches
    assert sampler.deterministic is None
    whole = ends(sampler)
    for cut in (1, 2):
        assert torch.equal(ends(sampler, cut), whole)
    with sampler:
        half = sampler.run(sampler.start([1, 2]), 1)
        assert half.transition.std == pytest.approx(sampler.std(0))
        children = sampler.run(half.select([0, 0]).reseed([5, 6]), 2)
        assert not torch.equal(children.latents[0], children.latents[1])
        assert not children.reseeded
        assert torch.equal(children.x0[0], children.x0[1])
        # nothing is drawn at the last step
        assert sampler.std(2) == 0.0
        last = sampler.run(children).transition
        assert last.std == 0.0
        twins = children.select([0, 0]).reseed([5, 6])
        with pytest.raises(ValueError, match="came out alike at 3"):
            sampler.run(twins)


def test_a_transition_says_where_the_latents_came_from(sampler_for):
    """Latents are mean + drift + std z with z of the image's own generator; densities follow."""
    for name, kernel in ((SDXL, Eta(1.0)), (SD3, FlowSDE())):
        sampler = sampler_for(name, kernel=kernel)
        with sampler:
            half = sampler.run(sampler.start([1, 2]), 1)
            drift = torch.full_like(half.latents, 0.25)
            plain, shifted = sampler.run(half, 2), sampler.run(half, 2, drift=drift)
        torch.testing.assert_close(shifted.latents, plain.latents + drift)
        for row, rng in enumerate(half.rng):
            generator = torch.Generator()
            generator.set_state(rng)
            z = torch.randn(half.latents.shape[1:], generator=generator)
            expected = plain.transition.mean[row] + plain.transition.std * z
            torch.testing.assert_close(plain.latents[row], expected)
        transition = shifted.transition
        assert torch.equal(transition.log_p(plain.latents), plain.transition.log_p(plain.latents))
        z = (shifted.latents - transition.mean) / transition.std
        difference = transition.log_q(shifted.latents) - transition.log_p(shifted.latents)
        u = 0.25 / transition.std
        expected = (z.double() * u - u * u / 2).flatten(1).sum(1)
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", [SD3, pytest.param(FLUX, marks=pytest.mark.slow)])
def test_flow_pipelines_draw_from_the_generators_of_the_images(sampler_for, name):
    """They hand no generator to their scheduler; here each image has its own all the same."""
    options = {"stochastic_sampling": True}
    sampler = sampler_for(name, scheduler="FlowMatchEulerDiscreteScheduler", options=options)
    assert sampler.branches
    state = torch.random.get_rng_state()
    whole = ends(sampler)
    assert torch.equal(ends(sampler), whole)
    assert torch.equal(ends(sampler, 2), whole)
    with sampler:
        alone = sampler.run(sampler.start([2])).latents
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert torch.equal(torch.random.get_rng_state(), state)


ALIKE = (
    (SD, None, {}, "DDIMScheduler draws no noise.*kernel=Eta.*eta=1.0 in the call"),
    (SD3, None, {}, "FlowMatchEulerDiscreteScheduler.*FlowSDE"),
    (SD, "PNDMScheduler", {}, "PNDMScheduler.*with DDIMScheduler"),
    (SD, None, {"kernel": Eta(0.0)}, "eta=0.0.*draws no noise"),
    (FLUX, None, {"kernel": FlowSDE(0.0)}, "FlowSDE.*draws no noise"),
)


@pytest.mark.parametrize(("name", "scheduler", "options", "match"), ALIKE, ids=repr)
def test_children_that_could_not_differ_are_refused_before_any_compute(
    sampler_for, name, scheduler, options, match
):
    sampler = sampler_for(name, scheduler=scheduler, **options)
    assert not sampler.branches
    with sampler:
        half = sampler.run(sampler.start([1]), 2)
        rows = sampler.meter.rows
        with pytest.raises(ValueError, match=match):
            sampler.run(half.select([0, 0]).reseed([1, 2]))
        assert sampler.meter.rows == rows


def test_kernels_that_cannot_act_are_refused(sampler_for):
    refusals = (
        (SD, {"kernel": VPFlow()}, "VPFlow is for flow models.*Eta"),
        (SD, {"kernel": FlowSDE()}, "FlowSDE is for flow models.*Eta"),
        (SD, {"kernel": Eta(), "scheduler": "HeunDiscreteScheduler"}, "one evaluation per step"),
        (SD, {"kernel": Eta(), "scheduler": "PNDMScheduler"}, "one evaluation per step"),
    )
    for name, options, match in refusals:
        sampler = sampler_for(name, **options)
        with pytest.raises(da.UnsupportedModel, match=match):
            sampler.__enter__()
    sampler = sampler_for(SD)
    with sampler:
        start = sampler.start([1])
        with pytest.raises(da.UnsupportedModel, match="drift needs a kernel"):
            sampler.run(start, 1, drift=start.latents)
        with pytest.raises(ValueError, match=r"drift=\.\.\.\) must be"):
            sampler.run(start, 1, drift=start.latents[:, :1])
        with pytest.raises(da.UnsupportedModel, match="does not say what noise"):
            sampler.std(0)
    for kernel in (lambda: Eta(1.5), lambda: FlowSDE("s3"), lambda: VPFlow("s2")):
        with pytest.raises(ValueError, match="must be"):
            kernel()
