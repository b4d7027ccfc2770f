"""Every registered pipeline class: plain CFG through a session is native CFG, bit for bit, and a
skipped branch is really skipped."""

from dataclasses import dataclass, replace

import pytest
import torch

import diffalign as da
from diffalign.core import COND, Guidance
from diffalign.families import FAMILIES
from diffalign.testing.final import final as run
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_variants

# configurations without an unconditional branch, or whose own guidance is refused, have their own
# tests
WITHOUT = ("embedded", "schnell", "dynamic")
CASES = [
    (name, variant)
    for name in sorted(FAMILIES)
    if FAMILIES[name].gates
    for variant in tiny_variants(name)
    if variant not in WITHOUT
]
# their tiny text encoders see images and take seconds; the full suite runs them
SLOW = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
QUICK_FIRST = [
    pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in CASES
]
# with guidance on these sample the control image for both branches, so their noise differs from
# that of a run without guidance
SAMPLED = ("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline")
ONE_IMAGE = ("WanVACEPipeline", "QwenImageEditPlusPipeline")  # one image per call
# Cosmos forms x0 from each prediction before it mixes them, so the guided value cannot be handed
# over exactly
RELATIVE = {"cosmos2": 2.9e-6}


def final(pipe, given):
    """Some ControlNet pipelines sample their control image from the global generator: the same one
    for every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(pipe, given)


@dataclass(frozen=True, slots=True)
class AlwaysSkip(Guidance[None]):
    """Asks for the conditional pass only, although the pipeline runs with guidance on."""

    def passes(self, step, state):
        return (COND,)

    def combine(self, preds, step, state):
        return preds[COND], None


def inputs(name, variant, scale, batch, dtype):
    gate = FAMILIES[name].gates[0]
    batch = 1 if name in ONE_IMAGE else batch
    call = {**tiny_inputs(name, variant=variant, batch=batch, dtype=dtype, steps=3), gate: scale}
    dropped = FAMILIES[name].only_guided if scale == FAMILIES[name].off else ()
    return {key: value for key, value in call.items() if key not in dropped}


def assert_same(name, got, native, dtype):
    assert torch.isfinite(native).all()
    bound = RELATIVE.get(FAMILIES[name].name)
    if bound is None:
        assert torch.equal(got, native)
    else:
        bound *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert (got - native).abs().max() <= bound * native.abs().max()


def check_identity(monkeypatch, name, variant, dummy, batch, dtype):
    pipe = tiny_pipeline(name, variant=variant, dtype=dtype)
    native = final(pipe, inputs(name, variant, 4.0, batch, dtype))
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], placeholder=dummy))
    with da.apply(pipe, da.CFG()) as session:
        assert_same(name, final(pipe, inputs(name, variant, 4.0, batch, dtype)), native, dtype)
    report = session.report()
    if variant != "truncated":  # there the pipeline itself stops guiding, and so do we
        assert report.nfe == report.nfe_cfg
        assert report.guided_steps == report.steps > 0
    assert torch.equal(final(pipe, inputs(name, variant, 4.0, batch, dtype)), native)


@pytest.mark.parametrize(("name", "variant"), QUICK_FIRST)
@pytest.mark.few(4)
def test_cfg_is_native(monkeypatch, name, variant):
    check_identity(monkeypatch, name, variant, dummy=9.0, batch=2, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dummy", "batch", "dtype"),
    [(1.5, 1, torch.float32), (2.0, 2, torch.bfloat16), (9.0, 1, torch.bfloat16)],
)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_cfg_is_native_matrix(monkeypatch, name, variant, dummy, batch, dtype):
    check_identity(monkeypatch, name, variant, dummy, batch, dtype)


@pytest.mark.parametrize(("name", "variant"), QUICK_FIRST)
@pytest.mark.few(4)
def test_skipping_is_guidance_off(name, variant):
    """The same bits as native guidance off, and half the rows."""
    pipe = tiny_pipeline(name, variant=variant)
    family = FAMILIES[name]
    native = final(pipe, inputs(name, variant, family.off, 2, torch.float32))
    with da.apply(pipe, AlwaysSkip()) as session:
        got = final(pipe, inputs(name, variant, 4.0, 2, torch.float32))
    report = session.report()
    assert report.guided_steps == 0
    if family.remembers is not None:  # both branches read finished chunks, see test_chunks.py
        return
    assert report.rows == report.images * report.calls
    assert report.nfe * 2 == report.nfe_cfg
    if name not in SAMPLED:
        assert torch.equal(got, native)


@pytest.mark.parametrize(("name", "variant"), QUICK_FIRST)
@pytest.mark.few(4)
def test_scale_one_leaves_the_pipeline_alone(name, variant):
    pipe = tiny_pipeline(name, variant=variant)
    family = FAMILIES[name]
    native = final(pipe, inputs(name, variant, family.off, 1, torch.float32))
    with da.apply(pipe, da.CFG(1.0)) as session:
        got = final(pipe, inputs(name, variant, family.off, 1, torch.float32))
    assert torch.equal(got, native)
    assert session.report().nfe * 2 == session.report().nfe_cfg


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_prompts_negatives_and_several_images(name):
    """Strings, one negative prompt per row, two images per prompt, one generator per image."""

    def call():
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        given = {
            **tiny_inputs(name, text=True, batch=2, steps=3),
            "guidance_scale": 5.0,
            "num_images_per_prompt": 2,
            "generator": generators,
        }
        return {
            **given,
            "prompt": ["a red apple", "two cats"],
            "negative_prompt": ["blurry", "a green bench and a dog"],
        }

    pipe = tiny_pipeline(name, text=True)
    native = final(pipe, call())
    with da.apply(pipe, da.CFG()) as session:
        got = final(pipe, call())
    assert torch.equal(got, native)
    assert session.report().images == len(native) == 4
