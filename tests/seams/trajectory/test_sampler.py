"""A trajectory cut anywhere and continued is the uncut one, bit for bit, for every technique."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import diffusers
import pytest
import torch

import diffalign as da
from diffalign.core import CFG_PASSES, State, TwoBranches, option
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.testing import tiny_inputs, tiny_pipeline

STEPS = 5
SD = "StableDiffusionPipeline"
PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "PixArtSigmaPipeline",
)


def sampler_of(name, *techniques, scheduler=None, **options):
    """A sampler over a tiny pipeline, and noise for two images of it."""
    pipe = tiny_pipeline(name)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    call = {**tiny_inputs(name, batch=2, steps=STEPS, **options)}
    for key in ("generator", "latents", "output_type", "return_dict"):
        call.pop(key, None)
    noise = noise_for(pipe, call)
    return PipelineSampler(pipe, techniques, **call), noise


def noise_for(pipe, call):
    """Noise of the shape that the pipeline draws itself."""
    shapes: list[Any] = []
    real = pipe.prepare_latents

    def look(*args, **kwargs):
        result = real(*args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result
        shapes.append(latents)
        raise StopIteration

    pipe.prepare_latents = look
    try:
        with pytest.raises(StopIteration):
            pipe(**call, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    finally:
        del pipe.prepare_latents
    return torch.randn(shapes[0].shape, generator=torch.Generator().manual_seed(7))


@dataclasses.dataclass(frozen=True, slots=True)
class Logged(TwoBranches[None]):
    """CFG that notes where it is told to be."""

    scale: float = option(4.0, "guidance scale")
    log: ClassVar[list[Any]] = []

    def passes(self, step, state):
        self.log.append((step.index, step.count, step.sigma, step.sigma_next, step.timestep))
        return CFG_PASSES

    def guide(self, cond, uncond, step, state):
        return step.mix(cond, uncond, self.scale), None


def cut_and_whole(sampler, noise, cut):
    """The end of an uncut run, and of one that is cut."""
    with sampler:
        whole = sampler.run(sampler.start([3, 4], noise))
        half = sampler.run(sampler.start([3, 4], noise), cut)
        assert half.step == cut
        assert half.count == whole.count
        kept = half.latents.clone()
        end = sampler.run(half)
        assert torch.equal(half.latents, kept), "a state changed while it was run"
        again = sampler.run(half)
    assert torch.equal(again.latents, end.latents), "a state cannot be run twice"
    assert end.finished
    return whole, end


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline(name):
    for techniques in ((), (da.CFG(3.0),)):
        sampler, noise = sampler_of(name, *techniques)
        whole, end = cut_and_whole(sampler, noise, 2)
        assert torch.equal(whole.latents, end.latents)
        assert float(whole.latents.std()) > 0


@pytest.mark.parametrize("name", [SD, pytest.param("FluxPipeline", marks=pytest.mark.slow)])
def test_a_run_in_one_piece_is_the_plain_pipeline(name):
    sampler, noise = sampler_of(name)
    with sampler:
        end = sampler.run(sampler.start([3, 4], noise))
        images = sampler.decode(end)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    call = {
        **sampler.segments.call.options,
        "latents": noise,
        "generator": generators,
        "return_dict": False,
    }
    assert torch.equal(end.latents, sampler.pipe(**call, output_type="latent")[0])
    assert torch.equal(images, sampler.pipe(**call, output_type="pt")[0])


TECHNIQUES = (
    da.AdaptiveGuidance(3.0, threshold=-1.0, space="eps", min_guided_steps=3),
    da.APG(3.0, cap=5.0, momentum=-0.5),
    da.ScheduledCFG(3.0),
    da.IntervalCFG(3.0, start=0.4, stop=0.8),
    da.S2Guidance(3.0, blocks=("mid_block*",)),
    da.CFGPlusPlus(0.6),
    da.RescaledCFG(3.0),
)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "cut", [2, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (1, 3, 4))]
)
@pytest.mark.few(2)
def test_every_technique_continues_where_it_was(technique, cut):
    """Latches, momentum, draws, windows and schedules: result and state as in the uncut run."""
    sampler, noise = sampler_of(SD, technique, scheduler="DDIMScheduler")
    whole, end = cut_and_whole(sampler, noise, cut)
    assert torch.equal(whole.latents, end.latents)
    assert repr(whole.techniques) == repr(end.techniques)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("cut", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_are_told_not_counted(scheduler, cut):
    sampler, noise = sampler_of(SD, Logged(), scheduler=scheduler)
    Logged.log.clear()
    with sampler:
        sampler.run(sampler.start([3, 4], noise))
        whole = list(Logged.log)
        Logged.log.clear()
        sampler.run(sampler.run(sampler.start([3, 4], noise), cut))
    assert whole == Logged.log
    assert {count for _, count, *_ in whole} == {STEPS}


def test_rows_are_selected_with_all_that_travels():
    """Two images run together, one taken at the cut: its end is what it is alone, to rounding."""
    technique = da.APG(3.0, cap=5.0, momentum=-0.5)
    sampler, noise = sampler_of(SD, technique, scheduler="DPMSolverMultistepScheduler")
    options = sampler.segments.call.options
    texts = {name: value for name, value in options.items() if name.endswith("embeds")}
    options.update({name: value[[0, 0]] for name, value in texts.items()})
    with sampler:
        half = sampler.run(sampler.start([3, 4], noise), 3)
        end = sampler.run(half)
        swapped = sampler.run(half.select([1, 0]))
        doubled = sampler.run(half.select([1, 1]))
    assert torch.equal(swapped.latents, end.latents[[1, 0]])
    assert torch.equal(doubled.latents[0], doubled.latents[1])
    torch.testing.assert_close(doubled.latents[0], end.latents[1], rtol=0, atol=1e-5)
    assert isinstance(half, State)


def test_the_scheduler_is_what_it_was():
    sampler, noise = sampler_of(SD, da.CFG(3.0), scheduler="UniPCMultistepScheduler")
    scheduler = sampler.pipe.scheduler
    cls, before = type(scheduler), dict(vars(scheduler))
    with sampler:
        sampler.run(sampler.start([3, 4], noise), 2)
        with pytest.raises(ValueError, match="must be above"):
            sampler.run(sampler.run(sampler.start([3, 4], noise), 2), 2)
    assert type(scheduler) is cls
    assert dict(vars(scheduler)) == before


def test_without_the_history_a_multistep_cut_differs():
    """The negative control: what ``State`` carries is needed."""
    sampler, noise = sampler_of(SD, da.CFG(3.0), scheduler="DPMSolverMultistepScheduler")
    with sampler:
        whole = sampler.run(sampler.start([3, 4], noise))
        half = sampler.run(sampler.start([3, 4], noise), 3)
        forgetful = dataclasses.replace(half, scheduler=None)
        assert not torch.equal(sampler.run(forgetful).latents, whole.latents)


def test_what_cannot_be_cut_is_refused():
    pipe = tiny_pipeline("StableDiffusionImg2ImgPipeline")
    with pytest.raises(da.UnsupportedModel, match="does not start from latents"):
        PipelineSampler(pipe, prompt="a")
    pipe = tiny_pipeline("StableDiffusion3Pipeline")
    with pytest.raises(da.UnsupportedModel, match="skip_guidance_layers"):
        PipelineSampler(pipe, prompt="a", skip_guidance_layers=[1])
    pipe = tiny_pipeline("Lumina2Pipeline")
    with pytest.raises(da.UnsupportedModel, match="an end of guidance"):
        PipelineSampler(pipe, prompt="a", cfg_trunc_ratio=0.5)
    with pytest.raises(ValueError, match="set by the sampler"):
        PipelineSampler(pipe, prompt="a", generator=torch.Generator())
    # a pipeline of old takes any word, and drops those that it does not know
    with pytest.raises(TypeError, match="Nearest: num_inference_steps"):
        PipelineSampler(tiny_pipeline(SD), prompt="a", num_inference_step=3)
    sampler, noise = sampler_of(SD)
    with pytest.raises(ValueError, match="for 1 seeds"):
        sampler.start([1], noise)
    with sampler, pytest.raises(ValueError, match="finished"):
        sampler.decode(sampler.run(sampler.start([1, 2], noise), 1))
