"""A sampler begins as the pipeline begins, encodes a text once and says what a run will cost."""

import pytest
import torch

import diffalign as da
from diffalign.core import Budget, BudgetExceeded, Meter, join
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.testing import tiny_pipeline

SD, SDXL, SD3 = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
OTHERS = (
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "QwenImagePipeline",
    "ChromaPipeline",
    "WanPipeline",
)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain(sampler, output, *seeds):
    """The unmodified pipeline."""
    arguments = sampler.segments.call.of(len(seeds))
    rng = generators(*seeds)
    rng = rng if len(rng) > 1 else rng[0]
    return sampler.pipe(**arguments, generator=rng, output_type=output, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (SD, True),
        ("FluxPipeline", False),
        *(pytest.param(n, n == SDXL, marks=pytest.mark.slow) for n in (SDXL, *OTHERS)),
    ],
)
def test_a_run_from_seeds_is_the_plain_call_with_generators(sampler_for, name, text):
    sampler = sampler_for(name, text=text, steps=2)
    for seeds in ((5,), (5, 6)):
        with sampler:
            end = sampler.run(sampler.run(sampler.start(seeds), 1))
            images = sampler.decode(end)
        assert torch.equal(end.latents, plain(sampler, "latent", *seeds))
        assert torch.equal(images, plain(sampler, "pt", *seeds))


def test_stochastic_steps_go_on_with_the_generator_that_drew_the_noise(sampler_for):
    sampler = sampler_for(SD, scheduler="EulerAncestralDiscreteScheduler")
    with sampler:
        end = sampler.run(sampler.run(sampler.start([5, 6]), 2))
    assert torch.equal(end.latents, plain(sampler, "latent", 5, 6))


def test_noise_that_is_given(sampler_for):
    sampler = sampler_for(SD3)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    with sampler:
        end = sampler.run(sampler.start([5, 6], noise))
        with pytest.raises(ValueError, match=r"noise must be \[1, 16, 8, 8\] for 1 seeds"):
            sampler.start([5], noise)
        with pytest.raises(ValueError, match="at least one seed"):
            sampler.start([])
    arguments = sampler.segments.call.of(2)
    call = {**arguments, "latents": noise, "output_type": "latent", "return_dict": False}
    assert torch.equal(end.latents, sampler.pipe(**call)[0])


def test_a_text_is_encoded_once(sampler_for, monkeypatch):
    sampler, calls = sampler_for(SD, da.NAG(4.0, negative_prompt="rain"), text=True), []
    encode = type(sampler.pipe.text_encoder).forward

    def count(self, *args, **kwargs):
        calls.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(sampler.pipe.text_encoder), "forward", count)
    with sampler:
        whole = sampler.run(sampler.start([5, 6]))
        first = len(calls)
        again = sampler.run(sampler.run(sampler.run(sampler.start([5, 6]), 1), 3))
        sampler.decode(again)
    assert len(calls) == first > 0
    assert torch.equal(whole.latents, again.latents)
    assert "encode_prompt" not in vars(sampler.pipe)
    with da.apply(sampler.pipe, da.NAG(4.0, negative_prompt="rain")):
        expected = plain(sampler, "latent", 5, 6)
    assert torch.equal(whole.latents, expected)


TECHNIQUES = (
    (),
    (da.CFG(3.0),),
    (da.CFG(1.0),),
    (da.IntervalCFG(3.0, start=0.25, stop=0.75),),
    (da.S2Guidance(3.0, blocks=("mid_block*",)),),
    (da.AdaptiveGuidance(3.0, threshold=2.0, space="eps"),),
    (da.NAG(4.0, negative_prompt="rain"),),
)


@pytest.mark.parametrize("techniques", TECHNIQUES, ids=lambda t: type(t[0]).__name__ if t else "-")
@pytest.mark.few(3)
def test_the_price_is_known_before_and_is_what_the_meter_counts(sampler_for, techniques):
    meter = Meter()
    sampler = sampler_for(SD, *techniques, text=True, meter=meter)
    prices = [sampler.price(i, i + 1) for i in range(sampler.count)]
    assert sampler.price() == sum(prices)
    assert meter.rows == 0
    with sampler:
        state = sampler.start([5, 6])
        for i, price in enumerate(prices):
            rows = meter.rows
            state = sampler.run(state, i + 1)
            assert meter.rows - rows == 2 * price, i
        assert meter.evaluations == 2 * sampler.count
        sampler.preview(state)
        sampler.decode(state)
    assert meter.decodes == 4


def test_the_price_of_a_latch_is_an_upper_bound(sampler_for):
    sampler = sampler_for(SD, da.AdaptiveGuidance(3.0, threshold=-1.0, space="eps"))
    with sampler:
        sampler.run(sampler.start([5]))
    assert sampler.meter.rows < sampler.price() == 8


def test_a_budget_ends_a_run_and_leaves_the_pipeline_as_it_was(sampler_for):
    sampler = sampler_for(SD, da.CFG(3.0), meter=Meter(Budget(nfe=5)))
    pipe, scheduler = sampler.pipe, sampler.pipe.scheduler
    before = type(pipe), type(scheduler), dict(vars(scheduler)), set(vars(pipe))
    with pytest.raises(BudgetExceeded), sampler:
        sampler.run(sampler.start([5]))
    assert sampler.meter.evaluations == 2
    assert (type(pipe), type(scheduler), dict(vars(scheduler))) == before[:3]
    assert "encode_prompt" not in vars(pipe)
    assert not sampler.is_open


def test_only_one_sampler_is_open_and_others_wait(sampler_for):
    first = sampler_for(SD, da.CFG(3.0))
    options = first.segments.call.options
    second = PipelineSampler(first.pipe, (da.APG(3.0, cap=5.0, momentum=0.0),), **options)
    with pytest.raises(da.SessionError, match="not open"):
        first.run(first.start([1]))
    with first:
        assert second.price() == first.price()
        with pytest.raises(da.SessionError, match="Another sampler is open"):
            second.__enter__()
        state = first.run(first.start([1]), 2)
    with second:
        second.run(second.start([1]))
    with first:  # a sampler may be opened again, and its states go on
        assert first.run(state).finished


def test_states_of_several_runs_are_joined(sampler_for):
    """History and momentum too: the end is what the parts come to, to rounding."""
    technique = da.APG(3.0, cap=5.0, momentum=-0.5)
    sampler = sampler_for(SD, technique, scheduler="DPMSolverMultistepScheduler")
    with sampler:
        parts = [sampler.run(sampler.start(seeds), 2) for seeds in ((1, 2), (3,))]
        together = sampler.run(join(parts))
        ends = [sampler.run(part) for part in parts]
    expected = torch.cat([end.latents for end in ends])
    size = float(expected.abs().max())
    torch.testing.assert_close(together.latents, expected, rtol=0, atol=1e-6 * size)
    assert len(together.techniques["apg"].latest) == 3


def test_the_number_of_images_follows_one_prompt_only(sampler_for):
    sampler = sampler_for(SD, batch=2)
    with sampler, pytest.raises(ValueError, match="2 prompts and makes 2 images; got a state of 3"):
        sampler.start([1, 2, 3])


def test_what_a_sampler_refuses():
    pipe = tiny_pipeline(SDXL)
    with pytest.raises(ValueError, match="needs prompt"):
        PipelineSampler(pipe)
    with pytest.raises(da.UnsupportedModel, match=r"denoising_end=0\.8"):
        PipelineSampler(pipe, prompt="a", denoising_end=0.8)


def test_bad_states_are_refused(sampler_for):
    sampler, longer = sampler_for(SD), sampler_for(SD, steps=5)
    with sampler:
        start = sampler.start([1])
        end = sampler.run(start)
        with pytest.raises(ValueError, match="is finished"):
            sampler.run(end)
        with pytest.raises(ValueError, match="at most 4"):
            sampler.run(start, 5)
        with pytest.raises(ValueError, match="run one step first"):
            sampler.preview(start)
        with pytest.raises(ValueError, match="has 5 evaluations, this sampler 4"):
            sampler.run(longer.start([1]))
        sampler.pipe.scheduler = tiny_pipeline(SDXL).scheduler
        with pytest.raises(da.SessionError, match="DDIMScheduler and is EulerDiscreteScheduler"):
            sampler.run(start)
