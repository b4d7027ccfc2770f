import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.core import COND, UNCOND, StepInfo
from diffalign.guidance import CFG, IntervalCFG
from diffalign.testing.contracts import GuidanceContract, ddim
from diffalign.testing.oracles import TwoGaussians, run


class TestIntervalCFG(GuidanceContract):
    def make(self):
        return IntervalCFG(3.0, start=0.25, stop=0.75)

    def off(self):
        return IntervalCFG(3.0, sigma=(0.0, math.inf)), CFG(3.0)

    def rows(self, steps, batch):
        return (steps + steps // 2) * batch


class TestIntervalCFGInSigma(TestIntervalCFG):
    flow = True

    def make(self):
        return IntervalCFG(3.0, sigma=(0.3, 0.9))

    def rows(self, steps, batch):
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps)
        return batch * (steps + sum(0.3 <= float(s) < 0.9 for s in scheduler.sigmas[:-1]))


@pytest.mark.parametrize(
    ("sigma", "guided"), [(0.19, True), (1.0, True), (1.61, False), (0.18, False)]
)
def test_band_is_half_open(sigma, guided):
    step = StepInfo(3, 10, sigma)
    assert IntervalCFG(3.0, sigma=(0.19, 1.61)).passes(step, None) == (
        (COND, UNCOND) if guided else (COND,)
    )


@pytest.mark.parametrize(
    ("start", "stop", "count", "guided"),
    [(0.0, 0.5, 5, [0, 1]), (0.3, 0.7, 10, [3, 4, 5, 6]), (0.8, 1.0, 5, [4])],
)
def test_fractions_of_steps_round_down(start, stop, count, guided):
    made = IntervalCFG(3.0, start=start, stop=stop)
    assert [
        i for i in range(count) if len(made.passes(StepInfo(i, count, 1.0), None)) == 2
    ] == guided


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": (2.0, 1.0)},
        {"sigma": (-1.0, 1.0)},
        {"start": 0.6, "stop": 0.5},
        {"sigma": (0.1, 1.0), "start": 0.1},
    ],
)
def test_bad_windows_are_refused(options):
    with pytest.raises(ValueError, match="IntervalCFG"):
        IntervalCFG(3.0, **options)


# Closed form: for two Gaussians of equal std the probability-flow ODE is linear, so the guided mean
# is known exactly. An Euler run with step h has error c h + O(h^2); two runs give the limit to
# O(h^2).


def geometric(hi, lo, count):
    return list(np.geomspace(hi, lo, count + 1)[:-1])


def band_grid(lo, hi, top, n):
    """Noise levels from ``top`` to 0 with the band's edges just inside it, so that every step is
    wholly guided or wholly not."""
    below = lambda value: float(np.nextafter(np.float32(value), np.float32(0)))  # noqa: E731
    floor = 1e-3
    return [
        *geometric(top, below(hi), n),
        *geometric(below(hi), below(lo), n),
        *geometric(below(lo), floor, n),
        floor,
        0.0,
    ]


@pytest.mark.parametrize(("scale", "lo", "hi", "std", "expected"), [
    (3.0, 0.19, 1.61, 0.5, 2.2844),
    pytest.param(3.0, 0.19, 1.61, 1.0, 1.9211, marks=pytest.mark.slow),
    pytest.param(15.0, 0.28, 5.42, 0.5, 11.9978, marks=pytest.mark.slow),
    pytest.param(15.0, 0.28, 5.42, 1.0, 12.0798, marks=pytest.mark.slow),
])  # fmt: skip
def test_effective_weight_of_a_band(scale, lo, hi, std, expected):
    top = 80.0
    model = TwoGaussians(
        torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), std=std
    )
    assert model.band_weight(scale, lo, hi, top) == pytest.approx(expected, abs=5e-5)

    def reached(n):
        scheduler = EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
        levels = band_grid(lo, hi, top, n)
        start = torch.full(
            (1, 1), 0.0, dtype=torch.float64
        )  # starting at x = 0: the end is the mean's move alone
        trace = run(IntervalCFG(scale, sigma=(lo, hi)), model, scheduler, start, sigmas=levels)
        assert trace.rows == 3 * n + 1 + n  # the band has n of the 3n + 1 steps
        return trace.sample.item() / (1.0 - std / math.hypot(std, top))

    coarse, fine = reached(100), reached(200)
    limit = 2.0 * fine - coarse
    # what extrapolation leaves is of the order of (error of the fine run)^2 / weight; the last step
    # from 1e-3 adds (1e-3 / std)^2
    bound = (
        4.0 * (fine - expected) ** 2 / expected
        + expected * (1e-3 / std) ** 2
        + 5e-5
        + 400 * scale * torch.finfo(torch.float32).eps
    )
    assert abs(limit - expected) < bound
    assert abs(fine - expected) < abs(coarse - expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("name", ["ddim", "ddim-v", "euler", "flow"])
def test_cfg_reaches_the_guided_mean_at_first_order(name, scale):
    model = TwoGaussians(
        torch.full((1, 2), 0.8, dtype=torch.float64),
        torch.full((1, 2), -0.4, dtype=torch.float64),
        std=0.5,
    )
    noise = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    errors, counts = [], (25, 50, 100)
    for n in counts:
        if name == "euler":
            scheduler = EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
            )
            levels = [*geometric(14.0, 1e-4, n), 1e-4, 0.0]
            trace = run(CFG(scale), model, scheduler, noise, sigmas=levels)
            sigma, start = levels[0], noise * scheduler.init_noise_sigma
        elif name == "flow":
            levels = list(np.linspace(0.98, 0.0, n, endpoint=False))
            trace = run(
                CFG(scale), model, FlowMatchEulerDiscreteScheduler(shift=1.0), noise, sigmas=levels
            )
            sigma, start = (
                levels[0] / (1 - levels[0]),
                noise / (1 - levels[0]),
            )  # the same ODE in x / alpha
        else:
            scheduler: DDIMScheduler = ddim("v_prediction" if name == "ddim-v" else "epsilon")
            scheduler.config.timestep_spacing = "trailing"
            trace = run(CFG(scale), model, scheduler, noise, steps=n)
            sigma = trace.steps[0].sigma
            start = noise * math.sqrt(1 + sigma * sigma)
        exact = model.endpoint(start, sigma, scale)
        errors.append((trace.sample - exact).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.8, (slope, errors)
