"""Two segments are one run, bit for bit, at every cut, for every pair that the table names."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

import diffalign as da
from diffalign.seams.trajectory import schedule
from diffalign.seams.trajectory.sampler import PipelineSampler

TABLE = json.loads(Path(__file__).with_name("pairs.json").read_text())
PAIRS = [
    (name, scheduler, group)
    for group, names in TABLE["groups"].items()
    for name in names
    for scheduler in TABLE["pairs"][group]
]
SD, SDXL, SD3, FLUX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
)
QUICK = {(SD, "HeunDiscreteScheduler"), (SD3, "UniPCMultistepScheduler")}
MARKED = [
    pytest.param(*pair, marks=() if pair[:2] in QUICK else pytest.mark.exhaustive) for pair in PAIRS
]
STEPS = 5


def test_every_scheduler_of_diffusers_stands_in_the_table():
    names = {n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")}
    everywhere = TABLE["missing"]["everywhere"]
    for group in TABLE["groups"]:
        present, missing = set(TABLE["pairs"][group]), TABLE["missing"][group] | everywhere
        assert not present & missing.keys()
        assert names <= present | missing.keys()
        assert all(missing.values())


def sampler_of(sampler_for, name, scheduler, group, techniques):
    options = TABLE["options"][group].get(scheduler, {})
    if name != "emoji":
        return sampler_for(name, *techniques, scheduler=scheduler, options=options, steps=STEPS)
    pipe = da.load("emoji")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    call = {"prompt": "a red apple", "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return PipelineSampler(pipe, techniques, **call)


@pytest.mark.parametrize("techniques", [(), (da.CFG(3.0),)], ids=["plain", "session"])
@pytest.mark.parametrize(("name", "scheduler", "group"), MARKED)
@pytest.mark.few(2)
def test_two_segments_are_one_run(sampler_for, name, scheduler, group, techniques):
    sampler = sampler_of(sampler_for, name, scheduler, group, techniques)
    with sampler:
        start = sampler.start([3])
        whole = sampler.run(start)
        assert torch.isfinite(whole.latents).all()
        assert whole.latents.std() > 0
        for cut in range(1, sampler.count):
            end = sampler.run(sampler.run(start, cut))
            assert torch.equal(end.latents, whole.latents), cut
            assert torch.equal(end.x0, whole.x0), cut
            assert all(map(torch.equal, end.rng, whole.rng)), cut


def differs(sampler, cut=3, forget=False):
    """Whether a cut shows; ``forget``: without any history of the scheduler."""
    with sampler:
        start = sampler.start([3])
        half = sampler.run(start, cut)
        half = replace(half, scheduler=None) if forget else half
        return not torch.equal(sampler.run(half).latents, sampler.run(start).latents)


def forget(monkeypatch, name):
    """From here on one part of the history is lost at every cut."""
    before = schedule._restore

    def forgetful(scheduler, window):
        if window.history is not None:
            values = {k: v for k, v in window.history.values.items() if k != name}
            window.history = schedule.Snapshot(values, window.history.batch)
        before(scheduler, window)

    monkeypatch.setattr(schedule, "_restore", forgetful)


def test_a_history_without_one_of_its_parts_shows(sampler_for, monkeypatch):
    sampler = sampler_for(SD, scheduler="DPMSolverMultistepScheduler", steps=STEPS)
    assert not differs(sampler)
    forget(monkeypatch, "lower_order_nums")
    assert differs(sampler)


def test_a_history_without_its_predictions_ends_the_run(sampler_for, monkeypatch):
    sampler = sampler_for(SD, scheduler="DPMSolverMultistepScheduler", steps=STEPS)
    forget(monkeypatch, "model_outputs")
    with pytest.raises(TypeError, match="NoneType"):
        differs(sampler)


def test_without_a_start_scale_of_one_a_cut_shows(sampler_for, monkeypatch):
    sampler = sampler_for(SD, scheduler="EulerDiscreteScheduler", steps=STEPS)
    base = diffusers.EulerDiscreteScheduler
    assert not differs(sampler)
    part = {"init_noise_sigma": property(lambda self: 14.6), "_diffalign_base": base}
    variant = type(base.__name__, (schedule._segmented(base),), part)
    monkeypatch.setitem(schedule._CLASSES, base, variant)
    assert differs(sampler)


def test_without_the_place_of_the_window_a_cut_shows(sampler_for, monkeypatch):
    sampler = sampler_for(FLUX, steps=STEPS)
    assert not differs(sampler, forget=True)  # a single-step scheduler has no history but its place
    monkeypatch.setattr(schedule, "_shifted", lambda window, args, kwargs: (args, kwargs))
    assert differs(sampler, forget=True)


def test_lists_that_siblings_share_show(sampler_for, monkeypatch):
    """A state can be run twice only because its history is copied."""
    sampler = sampler_for(SD, scheduler="DPMSolverMultistepScheduler", steps=STEPS)
    monkeypatch.setattr(schedule, "_copy", lambda value: value)
    with sampler:
        half = sampler.run(sampler.start([3]), 2)
        first = sampler.run(half).latents
        assert not torch.equal(sampler.run(half).latents, first)
