"""The sampling loop: its images are the pipeline's own, and nothing stays behind."""

import functools
import inspect

import numpy as np
import pytest
import torch

import diffalign as da
from diffalign.core import Cancelled
from diffalign.drawing.png import read_settings, save_png
from diffalign.generate.samples import merged, picture, samples
from diffalign.generate.seeds import Job, jobs_of
from diffalign.seams import Report
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD = "StableDiffusionPipeline"
JOBS = jobs_of(["a red apple", "two cats", "a bench"], base=4)
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0}
IMAGES = ("FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "SanaPipeline")
IMAGES += ("Lumina2Pipeline", "ZImagePipeline", "Cosmos2TextToImagePipeline", "PixArtSigmaPipeline")


@pytest.fixture(scope="module")
def pipe():
    tiny = tiny_pipeline(SD, text=True)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def generators(jobs):
    return [torch.Generator().manual_seed(job.seed) for job in jobs]


def test_images_are_those_of_the_bare_pipeline(pipe):
    batches = list(samples(pipe, (), JOBS, batch=2, call={**CALL, "negative_prompt": "blurry"}))
    assert [len(batch) for batch in batches] == [2, 1]
    for batch, jobs in zip(batches, (JOBS[:2], JOBS[2:])):
        expected = pipe(
            [job.prompt for job in jobs],
            generator=generators(jobs),
            negative_prompt=["blurry"] * len(jobs),
            **CALL,
        ).images
        assert [sample.job for sample in batch] == jobs
        for sample, image in zip(batch, expected):
            assert np.array_equal(np.asarray(picture(sample.image)), np.asarray(image))
            assert (sample.image.dtype, sample.image.shape) == (torch.float32, (3, 16, 16))
            assert 0.0 <= sample.image.min() < sample.image.max() <= 1.0


def test_every_image_has_a_generator_of_its_own_on_the_cpu(pipe, monkeypatch):
    used, original = [], type(pipe).prepare_latents

    @functools.wraps(original)
    def watched(self, *arguments):
        (rngs,) = (argument for argument in arguments if isinstance(argument, list))
        used.append([(rng, rng.device.type, rng.get_state()) for rng in rngs])
        return original(self, *arguments)

    monkeypatch.setattr(type(pipe), "prepare_latents", watched)
    jobs = jobs_of(["a", "b"], count=3, base=5)
    assert sum(len(batch) for batch in samples(pipe, (), jobs, batch=4, call=CALL)) == 6
    assert [len(rngs) for rngs in used] == [4, 2]
    rngs = [entry for batch in used for entry in batch]
    assert len({id(rng) for rng, _, _ in rngs}) == 6
    for job, (_, device, state) in zip(jobs, rngs, strict=True):
        assert device == "cpu"
        assert torch.equal(state, torch.Generator("cpu").manual_seed(job.seed).get_state())


@pytest.mark.parametrize("name", IMAGES)
def test_pictures_are_rounded_as_the_pipelines_do(name):
    tiny = tiny_pipeline(name)
    tiny.set_progress_bar_config(disable=True)
    tensors, pictures = (
        tiny(**{**tiny_inputs(name, batch=2, steps=1), "output_type": kind})[0]
        for kind in ("pt", "pil")
    )
    for tensor, expected in zip(tensors, pictures, strict=True):
        assert np.array_equal(np.asarray(picture(tensor)), np.asarray(expected))


def test_techniques_act_and_travel_with_the_sample(pipe, tmp_path):
    technique = da.IntervalCFG(3.0, stop=0.5)
    (batch,) = samples(pipe, (technique,), JOBS, batch=4, call=CALL, facts={"model": "tiny"})
    assert batch[0].report is batch[2].report
    assert (batch[0].report.images, batch[0].report.guided_steps) == (3, 1)
    save_png(picture(batch[1].image), tmp_path / "two.png", batch[1].settings)
    settings = read_settings(tmp_path / "two.png")
    assert settings == batch[1].settings
    assert da.techniques_of(settings) == (technique,)
    expected = {"model": "tiny", "prompt": "two cats", "seed": JOBS[1].seed, "pipeline": SD}
    expected |= {"scheduler": "DDIMScheduler", "dtype": "float32", "device": "cpu"}
    assert expected.items() <= settings.items()


def test_copies_share_an_encoded_prompt(pipe, monkeypatch):
    jobs, texts = jobs_of(["a cat", "a dog"], count=2), []
    encode = type(pipe).encode_prompt

    def watched(self, prompt, *args, **kwargs):
        texts.append(prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", watched)
    (batch,) = samples(pipe, (), jobs, batch=4, call=CALL, copies=2)
    (single,) = samples(pipe, (), jobs, batch=4, call=CALL)
    assert texts == [["a cat", "a dog"], ["a cat", "a cat", "a dog", "a dog"]]
    for one, other in zip(batch, single):
        torch.testing.assert_close(one.image, other.image, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="consecutive jobs of each prompt"):
        next(samples(pipe, (), jobs[1:], batch=2, call=CALL, copies=2))


def test_latents_are_left_undecoded(pipe):
    ((sample,),) = samples(pipe, (), JOBS[:1], batch=1, call={**CALL, "output_type": "latent"})
    expected = pipe(
        ["a red apple"], generator=generators(JOBS[:1]), output_type="latent", **CALL
    ).images
    assert torch.equal(sample.image, expected[0])


def test_steps_are_told(pipe, monkeypatch):
    events = []
    for batch in samples(pipe, (), JOBS, batch=2, call=CALL, step=lambda: events.append("step")):
        events.append(len(batch))
    assert events == ["step"] * 3 + [2] + ["step"] * 3 + [1]
    original = type(pipe).__call__

    def silent(self, prompt, num_inference_steps, guidance_scale, generator, output_type):
        return original(
            self,
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
        )

    monkeypatch.setattr(type(pipe), "__call__", silent)
    assert "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters
    events.clear()
    next(samples(pipe, (), JOBS, batch=2, call=CALL, step=lambda: events.append("step")))
    assert events == ["step"] * 3


def test_a_run_ends_by_what_step_raises_and_leaves_nothing_behind(pipe):
    before, steps = (type(pipe), type(pipe.unet)), []

    def step():
        steps.append(1)
        if len(steps) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        next(samples(pipe, (da.CFG(3.0),), JOBS, batch=2, call=CALL, step=step))
    assert len(steps) == 2
    assert (type(pipe), type(pipe.unet)) == before
    assert da.active(pipe) == ()


def test_the_pipeline_is_plain_between_batches(pipe):
    for _ in samples(pipe, (da.CFG(3.0),), JOBS, batch=1, call=CALL):
        assert da.active(pipe) == ()


def test_the_global_random_state_is_untouched(pipe):
    before = torch.get_rng_state()
    next(samples(pipe, (), [Job("x", 1, "x")], batch=1, call=CALL))
    assert torch.equal(before, torch.get_rng_state())


def report(**values):
    return Report(pipeline="P", steps=2, nfe_cfg=4, sigma=[2, 1], **values)


def test_merged_reports():
    first = report(images=3, guided_steps=2, nfe=4, rows=12, calls=2, seconds=1.0, scale=[7.0, 5.0])
    second = report(
        images=1, guided_steps=1, nfe=3, rows=3, calls=2, seconds=0.5, scale=[3.0, None]
    )
    both = merged([first, second])
    assert (both.images, both.guided_steps, both.rows, both.calls, both.seconds) == (
        4,
        2,
        15,
        4,
        1.5,
    )
    assert both.nfe == (4 * 3 + 3) / 4
    assert both.scale == [(7 * 3 + 3) / 4, 5.0]
