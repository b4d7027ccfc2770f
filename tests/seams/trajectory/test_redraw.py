"""The last step drawn again is the step with new seeds, bit for bit, and costs nothing."""

import pytest
import torch

from diffalign.core import UnsupportedModel
from diffalign.seams.trajectory.cached import CachedSampler, first_block_cache
from diffalign.seams.trajectory.kernels import Eta, FlowSDE, VPFlow

pytestmark = pytest.mark.slow

SD, SD3, FLUX = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (SD, Eta(1.0)),
        (SD, Eta(0.3)),
        ("StableDiffusionXLPipeline", Eta(1.0)),
        (SD3, FlowSDE()),
        (FLUX, VPFlow()),
        ("PixArtSigmaPipeline", Eta(1.0)),
        ("WanPipeline", Eta(1.0)),
    ],
)
@pytest.mark.few(3)
def test_redrawing_is_reseeding_before_the_step(sampler_for, name, kernel):
    sampler = sampler_for(name, kernel=kernel)
    seeds = [7, 8, 9]
    with sampler:
        before = sampler.run(sampler.start([1, 2]), 2).select([0, 1, 1])
        after = sampler.run(before, 3)
        expected = sampler.run(before.reseed(seeds), 3)
        rows = sampler.meter.rows
        redrawn = sampler.redraw(after, seeds)
        assert sampler.meter.rows == rows
        assert torch.equal(redrawn.latents, expected.latents)
        assert torch.equal(redrawn.x0, expected.x0)
        assert not torch.equal(redrawn.latents, after.latents)
        # and what follows
        assert torch.equal(sampler.run(redrawn).latents, sampler.run(expected).latents)


def test_low_precision_is_rounded_as_the_step_rounds(sampler_for):
    sampler = sampler_for(SD3, kernel=FlowSDE(), dtype=torch.bfloat16)
    with sampler:
        before = sampler.run(sampler.start([1]), 1)
        redrawn = sampler.redraw(sampler.run(before, 2), [5])
        assert redrawn.latents.dtype == torch.bfloat16
        assert torch.equal(redrawn.latents, sampler.run(before.reseed([5]), 2).latents)


def test_a_drift_stays_in_the_mean(sampler_for):
    sampler = sampler_for(SD, kernel=Eta(1.0))
    with sampler:
        before = sampler.run(sampler.start([1]), 1)
        drift = torch.full_like(before.latents, 0.5)
        redrawn = sampler.redraw(sampler.run(before, 2, drift), [5])
        assert torch.equal(redrawn.latents, sampler.run(before.reseed([5]), 2, drift).latents)


def test_nothing_to_draw_again(sampler_for):
    sampler = sampler_for(SD3, kernel=Eta(1.0))
    with sampler:
        start = sampler.start([1])
        for state in (start, sampler.run(start)):
            with pytest.raises(ValueError, match="have no noise of a step"):
                sampler.redraw(state, [5])
        with pytest.raises(ValueError, match="needs 1 seeds, one each; got 2"):
            sampler.redraw(sampler.run(start, 1), [5, 6])
    deterministic = sampler_for(SD)
    with deterministic, pytest.raises(ValueError, match=r"alike. Pass kernel=Eta\(1.0\)"):
        deterministic.redraw(deterministic.run(deterministic.start([1]), 1), [5])
    silent = sampler_for(SD, scheduler="EulerAncestralDiscreteScheduler")
    with silent, pytest.raises(ValueError, match="does not say what it draws"):
        silent.redraw(silent.run(silent.start([1]), 1), [5])


@pytest.mark.parametrize("name", [FLUX, "WanPipeline", "QwenImagePipeline"])
def test_a_cache_is_on_inside_the_block_only(sampler_for, name):
    plain = sampler_for(name, steps=6)
    pipe, call = plain.pipe, plain.segments.call.options
    cached = CachedSampler(pipe, cache=1e9, **call)
    assert not pipe.transformer.is_cache_enabled
    with cached:
        assert pipe.transformer.is_cache_enabled
        draft = cached.run(cached.start([3])).latents
    assert not pipe.transformer.is_cache_enabled
    assert not [m for m in pipe.transformer.modules() if hasattr(m, "_diffusers_hook")]
    with plain:
        full = plain.run(plain.start([3])).latents
    # every later step repeats what the first one found
    assert not torch.equal(draft, full)
    with CachedSampler(pipe, cache=0.0, **call) as exact:
        assert torch.equal(exact.run(exact.start([3])).latents, full)
    with plain:
        assert torch.equal(plain.run(plain.start([3])).latents, full)


def test_a_cache_left_on_changes_the_image(sampler_for):
    """The negative control of the test above."""
    plain = sampler_for(FLUX, steps=6)
    with plain:
        full = plain.run(plain.start([3])).latents
    with first_block_cache(plain.pipe.transformer, 1e9), plain:
        assert not torch.equal(plain.run(plain.start([3])).latents, full)


def test_an_error_takes_the_cache_away(sampler_for):
    plain = sampler_for(FLUX)
    cached = CachedSampler(plain.pipe, cache=0.1, **plain.segments.call.options)
    with pytest.raises(KeyboardInterrupt), cached:
        raise KeyboardInterrupt
    assert not plain.pipe.transformer.is_cache_enabled
    # another sampler is open: nothing is half done
    with plain:
        with pytest.raises(RuntimeError, match="Another sampler"):
            cached.__enter__()
        assert not plain.pipe.transformer.is_cache_enabled


def test_models_without_the_cache_and_with_one_are_refused(sampler_for):
    for name, denoiser in ((SD, "UNet2DConditionModel"), (SD3, "SD3Transformer2DModel")):
        other = sampler_for(name)
        with pytest.raises(UnsupportedModel, match=f"{denoiser} has no feature cache"):
            CachedSampler(other.pipe, cache=0.1, **other.segments.call.options)
    plain = sampler_for(FLUX)
    with (
        first_block_cache(plain.pipe.transformer, 0.1),
        pytest.raises(UnsupportedModel, match="runs a feature cache already"),
    ):
        CachedSampler(plain.pipe, cache=0.1, **plain.segments.call.options)
    CachedSampler(plain.pipe, cache=0.1, **plain.segments.call.options)
