"""Clean latents are those that the scheduler itself computes; the forward process is exact."""

import functools
import math

import diffusers
import pytest
import torch

import diffalign as da

SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
# classes whose step returns what it takes for the clean latents
SAYING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("DDIMScheduler", "v_prediction"),
        ("KDPM2DiscreteScheduler", "epsilon"),
        *(
            pytest.param(name, prediction, marks=pytest.mark.slow)
            for name in SAYING
            for prediction in ("epsilon", "v_prediction")
        ),
    ],
)
def test_x0_is_the_schedulers_own(sampler_for, name, prediction):
    options = {"prediction_type": prediction}
    sampler = sampler_for(SD, scheduler=name, options=options, steps=3)
    cls, seen, checked = getattr(diffusers, name), [], 0

    @functools.wraps(cls.step)
    def look(self, *args, **kwargs):
        result = cls.step(self, *args, **kwargs)
        if len(result) > 1:
            seen.append(result[1])
        return result

    sampler.pipe.scheduler.__class__ = type(name, (cls,), {"step": look})
    with sampler:
        state = sampler.start([1, 2])
        for i in range(sampler.count):
            state = sampler.run(state, i + 1)
            if seen:
                size = max(float(seen[-1].abs().max()), 1.0)
                torch.testing.assert_close(state.x0, seen.pop(), rtol=0, atol=2e-6 * size)
                checked += 1
    assert checked


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_x0_of_solvers_that_keep_it(sampler_for, name):
    sampler = sampler_for(SD, scheduler=name)
    with sampler:
        state = sampler.run(sampler.start([1]), 3)
    kept = state.scheduler.values["model_outputs"][-1]
    torch.testing.assert_close(state.x0, kept, rtol=0, atol=2e-6 * float(kept.abs().max()))


@pytest.mark.parametrize("name", [SD3, FLUX])
def test_x0_of_flow_models_is_where_the_last_step_ends(sampler_for, name):
    sampler = sampler_for(name, steps=2)
    with sampler:
        end = sampler.run(sampler.start([1]))
        assert torch.allclose(end.x0, end.latents, atol=1e-5)
        torch.testing.assert_close(sampler.preview(end), sampler.decode(end), rtol=0, atol=1e-4)


def test_dropped_tokens_are_not_in_x0(sampler_for):
    sampler = sampler_for(SD3, steps=2)
    with sampler:
        state = sampler.run(sampler.start([1, 2]), 1)
    assert state.x0.shape == state.latents.shape


CASES = (
    (SD, "DDIMScheduler"),
    (SD, "EulerDiscreteScheduler"),
    (SD, "DPMSolverMultistepScheduler"),
    (SD3, None),
)


@pytest.mark.parametrize(("name", "scheduler"), CASES)
@pytest.mark.parametrize("to", [0, 1])
@pytest.mark.few(3)
def test_noise_again_has_the_marginals_of_the_forward_process(sampler_for, name, scheduler, to):
    """With latents ``a x0 + s eps`` of known x0 and eps, mean and variance are those of ``to``."""
    sampler = sampler_for(name, scheduler=scheduler)
    grid, images = sampler.grid, 256
    with sampler:
        state = sampler.run(sampler.start([1]), 2)
    state = state.select([0] * images)
    noised = sampler.renoise(state, to, range(images)).latents.double()
    noised = noised * (grid.initial if to == 0 else 1.0)
    low, high = grid.sigmas[2], grid.sigmas[to]
    if grid.flow:
        ratio = (1 - high) / (1 - low)
        spread = math.sqrt(high**2 - ratio**2 * low**2)
    else:
        ratio = math.sqrt((1 + low**2) / (1 + high**2)) if not grid.unscaled else 1.0
        spread = math.sqrt(high**2 - low**2) / (math.sqrt(1 + high**2) if ratio != 1 else 1.0)
    residual = (noised - ratio * state.latents.double()).flatten()
    count = residual.numel()
    # 5 standard errors of a mean and of a variance
    assert abs(residual.mean()) < 5 * spread / math.sqrt(count)
    assert abs(residual.var() / spread**2 - 1) < 5 * math.sqrt(2 / count)


def test_renoised_images_go_on(sampler_for):
    sampler = sampler_for(SD, da.CFG(3.0), scheduler="DPMSolverMultistepScheduler")
    with sampler:
        end = sampler.run(sampler.start([1, 2]))
        back = sampler.renoise(end, 2, [7, 8])
        assert (back.step, back.scheduler, back.techniques, back.x0) == (2, None, None, None)
        a, b = sampler.run(back), sampler.run(sampler.renoise(end, 2, [7, 8]))
        assert torch.equal(a.latents, b.latents)
        other = sampler.run(sampler.renoise(end, 2, [9, 8]))
        assert not torch.equal(other.latents[0], a.latents[0])
        with pytest.raises(ValueError, match="below the state's step 2"):
            sampler.renoise(back, 2, [1, 2])
        with pytest.raises(ValueError, match="needs 2 seeds"):
            sampler.renoise(end, 2, [1])
    for name in ("HeunDiscreteScheduler", "PNDMScheduler"):
        sampler = sampler_for(SD, scheduler=name)
        with sampler:
            state = sampler.run(sampler.start([1]), 2)
            with pytest.raises(da.UnsupportedModel, match="one evaluation per step"):
                sampler.renoise(state, 0, [1])
