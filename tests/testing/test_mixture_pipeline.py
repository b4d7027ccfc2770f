"""Real pipelines on formulas agree with the chain, and searches on them with the exact law."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.seams.trajectory import kernels
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.testing.mixture_pipeline import (
    StripeReward,
    chain_of,
    embeddings,
    mixture_pipeline,
)
from diffalign.testing.mixtures import Chain, Exact, Mixture
from diffalign.testing.search import SPAN

TWO = Mixture.of([[-2.0], [1.5]], [0.4, 0.3], [0.7, 0.3])
PLANE = Mixture.of([[-2.0, 1.0], [1.5, 0.0]], [0.4, 0.3], [0.7, 0.3])


def reward(x):
    return 1.5 * torch.tanh(x[:, 0])


def call_of(pipe, steps, **more):
    text = embeddings(pipe) if hasattr(pipe, "transformer") else {"prompt": "a point"}
    return text | {"num_inference_steps": steps, "guidance_scale": 1.0} | more


def walk(chain, mixture, x):
    """The chain without noise."""
    for step in range(chain.count):
        x = chain.mean(x, chain.predict(mixture, x, step), step)
    return x


@pytest.mark.parametrize("mixture", [TWO, PLANE], ids=["1-D", "2-D"])
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_deterministic_samplers_are_the_chain(kind, mixture):
    pipe = mixture_pipeline(mixture, kind)
    noise = torch.randn(
        5, mixture.size, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with PipelineSampler(pipe, **call_of(pipe, 7)) as sampler:
        state = sampler.run(sampler.start([0] * 5, noise))
        images = sampler.decode(state)
    expected = walk(chain_of(pipe, 7, eta=0.0), mixture, noise.flatten(1))
    # the schedulers' tables are float32
    assert torch.allclose(state.latents.flatten(1), expected, atol=1e-5)
    assert torch.allclose(
        StripeReward(lambda x: x.sum(1), mixture.size)(images, []), expected.sum(1), atol=1e-4
    )
    assert float(expected.abs().max()) < SPAN


def test_euler_is_ddim_on_its_levels():
    """Its scaled input and its own timesteps reach the formula rightly."""
    pipe = mixture_pipeline(TWO, "eps", EulerDiscreteScheduler(timestep_spacing="trailing"))
    noise = torch.tensor([[[[0.3]]], [[[-1.2]]]], dtype=torch.float64)
    with PipelineSampler(pipe, **call_of(pipe, 9)) as sampler:
        state = sampler.run(sampler.start([0, 0], noise))
    pipe.scheduler.set_timesteps(9)
    sigmas = [float(s) for s in pipe.scheduler.sigmas[:-1]]
    chain = Chain.vp([1 / (1 + s * s) for s in sigmas], eta=0.0)
    # Euler starts from noise of its own scale, which differs from unit noise by the top level
    start = noise.flatten(1) * float(pipe.scheduler.init_noise_sigma) / math.hypot(1, sigmas[0])
    assert torch.allclose(state.latents.flatten(1), walk(chain, TWO, start), atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "kernel", "eta"), [("eps", None, 1.0), ("v", "eta", 1.0), ("flow", "eta", 1.0)]
)
def test_stochastic_samplers_have_the_marginals_of_the_grid(kind, kernel, eta):
    """DDIM's own noise and our eta-kernel on both kinds of model: mean and variance of 3,000
    images within 5 standard errors of the exact chain."""
    pipe = mixture_pipeline(TWO, kind)
    call = call_of(pipe, 6) | ({} if kernel else {"eta": eta})
    kernel = kernels.Eta(eta) if kernel else None
    with PipelineSampler(pipe, kernel=kernel, **call) as sampler:
        assert sampler.branches
        x = sampler.run(sampler.start(list(range(3000)))).latents.flatten()
    exact = Exact(TWO, chain_of(pipe, 6, eta), reward)
    law, ends = exact.law(tilted=False), exact.ends[:, 0]
    mean = float((law * ends).sum())
    variance = float((law * (ends - mean) ** 2).sum())
    assert abs(float(x.mean()) - mean) < 5 * (variance / 3000) ** 0.5
    fourth = float((law * (ends - mean) ** 4).sum())
    error = math.sqrt((fourth - variance**2) / 3000)
    assert abs(float(x.var()) - variance) < 5 * error


def test_full_noising_of_a_flow_has_another_variance():
    """Negative control: the scheduler's own stochastic mode is biased at any number of steps."""
    unit = Mixture.of([[0.0]], 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe = mixture_pipeline(unit, "flow", scheduler)
    with PipelineSampler(pipe, **call_of(pipe, 10)) as sampler:
        x = sampler.run(sampler.start(list(range(2000)))).latents
    variance = float(x.var())
    assert abs(variance - 1.0) > 5 * (2 / 2000) ** 0.5


def test_twist_is_that_of_the_formula():
    pipe = mixture_pipeline(TWO, "eps")
    chain = chain_of(pipe, 6, 1.0)
    with PipelineSampler(pipe, kernel=kernels.Eta(1.0), **call_of(pipe, 6)) as sampler:
        state = sampler.run(sampler.start([1, 2, 3]), 3)
        score = StripeReward(reward)
        values, gradient = sampler.twist(state, lambda images: score(images, []))
    x = state.latents.flatten(1).requires_grad_()
    expected = reward(chain.predict(TWO, x, 3))
    (slope,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(values.double(), expected.detach(), atol=1e-5)
    assert torch.allclose(gradient.flatten(1), slope, atol=1e-5)


def test_ddim_is_the_default():
    assert isinstance(mixture_pipeline(TWO).scheduler, DDIMScheduler)
