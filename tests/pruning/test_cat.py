"""CAT on pipelines: off is the pipeline, its cost is counted, its state travels, and what it cannot
do is said."""

import dataclasses
import functools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from diffalign.alignment.checkpoint import Folder
from diffalign.core import UnsupportedModel
from diffalign.families import FAMILIES
from diffalign.seams.support import supports
from diffalign.seams.tokens.work import Work
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD3, FLUX, CHROMA = "StableDiffusion3Pipeline", "FluxPipeline", "ChromaPipeline"
ALPHA, SIGMA, QWEN = "PixArtAlphaPipeline", "PixArtSigmaPipeline", "QwenImagePipeline"
NAMES = [
    SD3,
    *(pytest.param(n, marks=pytest.mark.slow) for n in (FLUX, CHROMA, ALPHA, SIGMA, QWEN)),
]
STEPS = 6
ACTING = da.CAT(0.4, start=2)


@functools.cache
def pipeline(name, variant=""):
    return tiny_pipeline(name, variant=variant)


def run(name, *techniques, batch=2, steps=STEPS, **more):
    pipe = pipeline(name)
    inputs = {**tiny_inputs(name, batch=batch, steps=steps), **more}
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session.report()


def plain(name, **more):
    return final(pipeline(name), {**tiny_inputs(name, batch=2, steps=STEPS), **more})


@pytest.mark.parametrize("name", NAMES)
def test_keep_1_and_a_start_behind_the_run_are_the_pipeline(name):
    before = plain(name)
    for technique in (da.CAT(1.0, start=2), da.CAT(0.4, start=STEPS)):
        assert torch.equal(run(name, technique)[0], before)
    assert not torch.equal(run(name, ACTING)[0], before)
    assert torch.equal(plain(name), before)


def test_a_start_behind_the_run_is_said():
    _, report = run(SD3, da.CAT(0.4, start=20))
    assert "CAT never left a token out in this run's 6 steps." in report.notes
    assert report.pruning["CAT"]["operations"] == report.pruning["CAT"]["operations_of_all"]


@pytest.mark.parametrize("selection", ["cluster", "round-robin", "random", "movement", "ras"])
def test_a_batch_is_its_images(selection):
    technique = da.CAT(0.4, start=2, selection=selection)
    both, _ = run(SD3, technique)
    for image in range(2):
        inputs = tiny_inputs(SD3, batch=2, steps=STEPS)
        single = {
            key: value[image : image + 1] if isinstance(value, torch.Tensor | list) else value
            for key, value in inputs.items()
        }
        with da.apply(pipeline(SD3), technique):
            alone = final(pipeline(SD3), single)
        assert (alone - both[image]).abs().max() <= 1e-5 * both.abs().max()


def test_every_selection_is_another():
    results = [
        run(SD3, da.CAT(0.4, start=2, selection=s))[0]
        for s in ("cluster", "round-robin", "random", "movement", "ras")
    ]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])


# -- cost ------------------------------------------------------------------------------------------


def test_the_cost_of_the_documentation_by_hand():
    """SD3-medium at 1,024 pixels: 24 blocks of width 1,536, 4,096 image and 333 text tokens, of
    which 1,228 are computed: 0.352 of a step. PixArt-Sigma: 28 blocks of width 1,152, 300 tokens of
    text."""
    n, s, t, c = 4096, 1228, 333, 1536
    sd3 = Work(24 * 12 * c * c, 24 * 12 * c * c, 24 * c, 0, 0)
    ratio = (24 * c * c * (s + t) + 4 * c * (s + t) * (n + t)) / (
        24 * c * c * (n + t) + 4 * c * (n + t) ** 2
    )
    assert sd3(s, n, t) / sd3(n, n, t) == pytest.approx(ratio)
    assert ratio == pytest.approx(0.352, abs=5e-4)
    t, c = 300, 1152
    sigma = Work(28 * 14 * c * c, 28 * 2 * c * c, 0, 28 * c, 28 * c)
    ratio = (28 * c * c * s + 4 * c * c * t + 4 * c * s * (n + t)) / (
        28 * c * c * n + 4 * c * c * t + 4 * c * n * (n + t)
    )
    assert sigma(s, n, t) / sigma(n, n, t) == pytest.approx(ratio)


@pytest.mark.parametrize("name", NAMES)
def test_a_counter_of_operations_agrees(name):
    """Operations saved in a whole run, counted by torch, beside those of the report: what does not
    depend on the image tokens cancels."""
    size = {"height": 64, "width": 64} if name != QWEN else {"height": 128, "width": 128}
    pipe = tiny_pipeline(name) if name != SD3 else roomy()
    counts, technique = [], da.CAT(0.3, start=2, selection="round-robin")
    for techniques in ((), (technique,)):
        with (
            da.apply(pipe, *techniques) as session,
            sdpa_kernel(SDPBackend.MATH),  # torch does not count its fused kernel on CPUs
            FlopCounterMode(display=False) as counter,
        ):
            final(pipe, {**tiny_inputs(name, batch=1, steps=4), **size})
        counts.append(counter.get_total_flops())
    facts = session.report().pruning["CAT"]
    saved = facts["operations_of_all"] - facts["operations"]
    assert facts["tokens"] >= 64
    assert counts[0] - counts[1] == pytest.approx(saved, rel=0.01)
    assert facts["operations_of_all"] <= counts[0]


def roomy():
    """The tiny SD3 with places for 64 tokens and more."""
    pipe = tiny_pipeline(SD3)
    model = type(pipe.transformer)(**{**pipe.transformer.config, "pos_embed_max_size": 16})
    pipe.transformer = model.eval()
    return pipe


def test_the_report_says_what_was_left_out():
    _, report = run(SD3, ACTING)
    facts, model = report.pruning["CAT"], pipeline(SD3).transformer
    tokens, text, width = 16, 7, model.inner_dim
    assert (facts["computed"], facts["tokens"], facts["steps"]) == (math.floor(0.4 * 16), 16, 4)
    layers, rows = len(model.transformer_blocks), 4  # both branches of two images
    assert facts["cache_bytes"] == 2 * rows * layers * (tokens + text) * width * 4
    assert "CAT: 6 of 16 image tokens in 4 of 6 steps" in str(report)
    assert report.to_dict()["pruning"]["CAT"]["tokens"] == 16
    assert report.nfe == report.nfe_cfg


# -- state -----------------------------------------------------------------------------------------


def sampler(*techniques, steps=STEPS):
    inputs = tiny_inputs(SD3, batch=1, steps=steps)
    call = {k: v for k, v in inputs.items() if k not in ("generator", "output_type")}
    return PipelineSampler(pipeline(SD3), techniques, **call)


@pytest.mark.parametrize("cut", [1, 2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_in_segments_is_the_run(cut):
    with sampler(da.CFG(3.0), ACTING) as here:
        whole = here.run(here.start([0, 1]))
        half = here.run(here.start([0, 1]), until=cut)
        for _ in range(2):  # what a segment does leaves the state that it came from
            assert torch.equal(here.run(half).latents, whole.latents)
        other = here.run(half.select([1, 0, 1]))
    assert (other.latents - whole.latents[[1, 0, 1]]).abs().max() <= 1e-5


def test_a_state_is_saved_and_read_without_running_code(tmp_path):
    with sampler(da.CFG(3.0), ACTING) as here:
        half = here.run(here.start([0]), until=4)
        folder = Folder(tmp_path / "run", {"technique": "cat"})
        folder.save({"techniques": half.techniques})
        read = folder.load()["techniques"]
        other = dataclasses.replace(half, techniques=read)
        assert torch.equal(here.run(other).latents, here.run(half).latents)


@pytest.mark.slow
def test_states_of_several_runs_are_joined():
    from diffalign.core import join

    with sampler(da.CFG(3.0), ACTING) as here:
        whole = here.run(here.start([0, 1]))
        parts = [here.run(here.start([seed]), until=4) for seed in (0, 1)]
        joined = here.run(join(parts))
    assert (joined.latents - whole.latents).abs().max() <= 1e-5


@pytest.mark.slow
def test_gradients_pass_through_the_caches():
    """Recomputed evaluation by evaluation they are those of a run that keeps everything, and a
    difference of two renders says the same."""
    gradients = {}
    with sampler(da.CFG(3.0), da.CAT(0.4, start=2, selection="round-robin"), steps=4) as here:
        noise = here.start([0]).latents
        for mode in ("plain", "checkpoint"):
            leaf = noise.clone().requires_grad_()
            images = here.render(leaf, mode=mode)
            images.square().sum().backward()
            gradients[mode] = leaf.grad
        plain_images = here.render(noise, grad=False)
    assert torch.allclose(images.detach(), plain_images, atol=1e-5)
    assert torch.allclose(gradients["plain"], gradients["checkpoint"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_evaluations_of_a_step_have_caches_of_their_own():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = tiny_pipeline(SD3)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with da.apply(pipe, da.CFG(3.0), ACTING) as session:
        image = final(pipe, tiny_inputs(SD3, batch=2, steps=STEPS))
    assert image.isfinite().all()
    facts = session.report().pruning["CAT"]
    one = 2 * 4 * len(pipe.transformer.transformer_blocks) * (16 + 7) * 16 * 4
    assert facts["cache_bytes"] == 2 * one


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusionPipeline", "the convolutions of a U-Net need every position"),
        ("StableDiffusionXLPipeline", "the convolutions of a U-Net need every position"),
        ("SanaPipeline", "feed-forward layers are convolutions"),
        ("FluxKontextPipeline", "and of a reference"),
        ("QwenImageEditPipeline", "and of references"),
        ("StableDiffusion3ControlNetPipeline", "a ControlNet adds to every image token"),
        ("WanPipeline", "does not know where the image tokens of wan are embedded"),
    ],
)
def test_what_it_cannot_act_on_is_refused_by_name(name, words):
    pipe = tiny_pipeline(name)
    inputs = tiny_inputs(name, steps=2)
    with pytest.raises(UnsupportedModel, match=words), da.apply(pipe, ACTING):
        pipe(**inputs)
    assert words in next(row.reason for row in supports(pipe) if row.name == "cat")


def test_a_step_cache_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = tiny_pipeline(FLUX)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    words = "a step cache of the denoiser"
    with pytest.raises(UnsupportedModel, match=words), da.apply(pipe, ACTING):
        pipe(**tiny_inputs(FLUX, steps=2))


def test_it_acts_on_every_family_that_says_its_places():
    named = {name for name, family in FAMILIES.items() if family.tokens is not None}
    assert {SD3, FLUX, CHROMA, ALPHA, SIGMA, QWEN} <= named
    assert not any("Kontext" in name or "Edit" in name for name in named)


def test_two_choices_of_tokens_are_one_too_many():
    from diffalign.testing.left_out import RandomSets

    with pytest.raises(ValueError, match="CAT and RandomSets both choose the tokens"):
        da.apply(pipeline(SD3), ACTING, RandomSets())


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"start": 1}, {"clusters": 0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        da.CAT(**options)
