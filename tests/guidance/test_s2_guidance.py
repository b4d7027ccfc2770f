"""S2-Guidance against models that really lack the block: formula, off switches, masks."""

import collections
import math

import pytest
import torch

import diffalign as da
from diffalign.core import COND, UNCOND, Context, StepInfo
from diffalign.families import FAMILIES
from diffalign.guidance import CFG
from diffalign.guidance.s2_guidance import S2Guidance
from diffalign.guidance.skip_layer_guidance import SkipLayerGuidance
from diffalign.guidance.skipping import SKIPPED
from diffalign.seams.blocks.sites import sites
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.deep import PIPELINES, deep_pipeline, without_block
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

EVERYWHERE = {"start": 0.0, "stop": 1.0}
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
SD = "StableDiffusionPipeline"
QUICK = {SD, "FluxPipeline"}


class TestS2Guidance(GuidanceContract):
    def make(self):
        return S2Guidance(3.0, blocks=(1, 2, 3, 4), n_drop=2, seed=5)

    def off(self):
        return S2Guidance(3.0, omega=0.0, blocks=(1, 2, 3, 4)), CFG(3.0)

    def rows(self, steps, batch):
        assert steps == 8  # the window is steps 0 to 6: floor(0.1 * 8) = 0, floor(0.9 * 8) = 7
        return batch * (7 * 3 + 2)


class TestS2GuidanceWithoutCFG(TestS2Guidance):
    flow = True

    def make(self):
        return S2Guidance(1.0, blocks=(1, 2, 3), sigma=(0.3, 0.9))

    def off(self):
        return S2Guidance(1.0, omega=0.0, blocks=(1,)), CFG(1.0)

    def rows(self, steps, batch):
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps)
        return batch * (steps + sum(0.3 <= float(s) < 0.9 for s in scheduler.sigmas[:-1]))


def sampled(pipelines):
    """Every pipeline, those beyond the sample of `make check` marked slow."""
    slow = {name: () if name in QUICK else pytest.mark.slow for name in pipelines}
    return [pytest.param(*item, marks=slow[item[0]]) for item in pipelines.items()]


def call(pipe, technique, name, variant="", **options):
    scale = options.pop("scale", 4.0)
    inputs = tiny_inputs(
        name, variant=variant, steps=options.pop("steps", 2), batch=options.pop("batch", 1)
    )
    with da.apply(pipe, technique) as session:
        return final(pipe, {**inputs, FAMILIES[name].gates[0]: scale, **options}), session.report()


def test_combine_is_equation_4():
    """Numbers by hand: 1 + 2 * (4 - 1) + 0.25 * (4 - 2) = 7.5; the appendix form would give 1 + 2 *
    3 - 0.25 * 2 = 6.5."""
    cond, uncond, skipped = (torch.full((2, 3), value) for value in (4.0, 1.0, 2.0))
    preds = {COND: cond, UNCOND: uncond, SKIPPED: skipped}
    out, _ = S2Guidance(2.0).combine(preds, StepInfo(0, 1, 1.0), None)
    assert torch.equal(out, torch.full((2, 3), 7.5))
    out, _ = S2Guidance(1.0).combine({COND: cond, SKIPPED: skipped}, StepInfo(0, 1, 1.0), None)
    assert torch.equal(out, torch.full((2, 3), 4.5))
    out, _ = S2Guidance(0.0).combine(preds, StepInfo(0, 1, 1.0), None)
    assert torch.equal(out, torch.full((2, 3), 1.5))
    out, _ = SkipLayerGuidance(2.0, layers=(1,)).combine(preds, StepInfo(0, 1, 1.0), None)
    assert torch.equal(out, torch.full((2, 3), 7.0 + 2.8 * 2.0))
    # equal weights everywhere change nothing: they sum to 1
    same = dict.fromkeys(preds, cond)
    assert torch.equal(S2Guidance(7.5).combine(same, StepInfo(0, 1, 1.0), None)[0], cond)


# DiT returns decoded images, and Cosmos' single step ends where it began
AFFINE = {
    name: variant
    for name, variant in PIPELINES.items()
    if name not in ("DiTPipeline", "Cosmos2TextToImagePipeline")
}


@pytest.mark.parametrize(("name", "variant"), sampled(AFFINE))
def test_one_step_equals_the_formula_with_a_deleted_block(name, variant):
    """A first step is affine in the prediction, so the formula holds between final latents; the
    third model really lacks the block."""
    pipe = deep_pipeline(name, variant)
    if name == "LTXPipeline":
        pipe.scheduler.register_to_config(
            shift_terminal=None
        )  # divides by zero when there is one step
    family = FAMILIES[name]
    inner = [site.name for site in sites(getattr(pipe, family.denoisers[0])) if site.edge is None]
    block, omega = inner[-1], 0.25
    scale = (
        1.0 if family.name in ("qwen", "lumina2") else 4.0
    )  # these renormalise what they mix, which is not affine
    on, report = call(
        pipe, S2Guidance(scale, omega=omega, blocks=(block,), **EVERYWHERE), name, variant, steps=1
    )
    assert report.rows == (2 if scale == 1.0 else 3)
    cfg, _ = call(pipe, CFG(scale), name, variant, steps=1)
    cond, _ = call(pipe, CFG(1.0), name, variant, steps=1)
    skipped, _ = call(without_block(pipe, block), CFG(1.0), name, variant, steps=1)
    expected = cfg.double() + omega * (cond.double() - skipped.double())
    largest = max(value.abs().max().item() for value in (cfg, cond, skipped))
    # one step multiplies the prediction by a number of order one; batched and single rows round
    # differently by some last places
    bound = 64 * torch.finfo(torch.float32).eps * largest
    assert (on.double() - expected).abs().max().item() <= bound
    assert (expected - cfg.double()).abs().max().item() > 20 * bound


def test_mean_over_all_blocks():
    """Averaged over every block, one step is CFG plus omega times (cond - mean of the models
    without a block)."""
    name = "PixArtSigmaPipeline"
    pipe = deep_pipeline(name, extra=3)
    inner = [site.name for site in sites(pipe.transformer) if site.edge is None]
    assert len(inner) == 3
    mean = torch.stack(
        [
            call(pipe, S2Guidance(blocks=(b,), **EVERYWHERE), name, steps=1)[0].double()
            for b in inner
        ]
    ).mean(0)
    cfg, cond = (call(pipe, CFG(scale), name, steps=1)[0].double() for scale in (4.0, 1.0))
    lacking = torch.stack(
        [call(without_block(pipe, b), CFG(1.0), name, steps=1)[0].double() for b in inner]
    ).mean(0)
    expected = cfg + 0.25 * (cond - lacking)
    assert (mean - expected).abs().max() <= 256 * torch.finfo(torch.float32).eps * cfg.abs().max()


@pytest.mark.parametrize(("name", "variant"), sampled(PIPELINES))
def test_off_and_on_and_untouched_afterwards(name, variant):
    pipe = deep_pipeline(name, variant)
    family = FAMILIES[name]
    call(
        pipe, CFG(1.0), name, variant
    )  # diffusers leaves its own cache hook behind on the first call
    modules = [
        m for attribute in family.denoisers if (m := getattr(pipe, attribute, None)) is not None
    ]
    before = [(type(m), dict(vars(m)).keys()) for module in modules for m in module.modules()]
    native, base = call(pipe, CFG(), name, variant, steps=3, batch=2)
    off, report = call(pipe, S2Guidance(omega=0.0), name, variant, steps=3, batch=2)
    assert torch.equal(off, native)
    assert (report.rows, report.calls) == (base.rows, base.calls) == (12, report.calls)
    on, report = call(pipe, S2Guidance(**EVERYWHERE), name, variant, steps=3, batch=2)
    assert report.rows == 18
    assert report.nfe == 9
    assert on.isfinite().all()
    assert not torch.equal(on, native)
    again, _ = call(pipe, S2Guidance(**EVERYWHERE), name, variant, steps=3, batch=2)
    assert torch.equal(on, again)
    assert [
        (type(m), dict(vars(m)).keys()) for module in modules for m in module.modules()
    ] == before
    assert torch.equal(call(pipe, CFG(), name, variant, steps=3, batch=2)[0], native)


@pytest.mark.parametrize(("name", "variant"), sampled(PIPELINES))
def test_without_cfg_two_passes(name, variant):
    """With CFG off the skipped pass is the second; it must be the one that skips (a guider that
    counts passes gets this wrong)."""
    pipe = deep_pipeline(name, variant)
    on, report = call(pipe, S2Guidance(1.0, **EVERYWHERE), name, variant, steps=2)
    plain, base = call(pipe, CFG(1.0), name, variant, steps=2)
    assert (report.rows, base.rows) == (4, 2)
    assert not torch.equal(on, plain)
    off, report = call(pipe, S2Guidance(1.0, omega=0.0), name, variant, steps=2)
    assert torch.equal(off, plain)
    assert report.rows == 2


def test_a_block_that_is_the_identity_and_no_block_at_all():
    pipe = tiny_pipeline(SD)
    block = pipe.unet.get_submodule(MIDDLE)
    with torch.no_grad():
        for part in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[-1]):
            part.weight.zero_()
            part.bias.zero_()
    plain, _ = call(pipe, CFG(1.0), SD)
    for technique in (
        S2Guidance(1.0, blocks=(MIDDLE,), **EVERYWHERE),
        S2Guidance(1.0, n_drop=0, **EVERYWHERE),
    ):
        out, report = call(pipe, technique, SD)
        assert torch.equal(out, plain)
        assert report.rows == 4


def resolved(technique, steps=10):
    return technique.resolve(Context("P", "oracle", "model", "S", 3.0, "call", steps))


def test_masks_are_drawn_per_step_uniformly_and_repeatably():
    made = resolved(S2Guidance(blocks=tuple(range(12)), n_drop=2, seed=3))
    draws = [made.blocks_at(i) for i in range(1200)]
    assert draws == [
        resolved(S2Guidance(blocks=tuple(range(12)), n_drop=2, seed=3)).blocks_at(i)
        for i in range(1200)
    ]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert [
        resolved(S2Guidance(blocks=tuple(range(12)), n_drop=2, seed=4)).blocks_at(i)
        for i in range(1200)
    ] != draws
    share = 2 / 12
    for count in collections.Counter(name for draw in draws for name in draw).values():
        assert abs(count - 1200 * share) < 5 * math.sqrt(1200 * share * (1 - share))
    pairs = collections.Counter(draws)
    assert len(pairs) == 66  # every pair occurs: a missing one has probability (65/66)^1200 = 1e-8
    # a solver's second evaluation of a step uses the same blocks
    first, second = (
        made.passes(StepInfo(4, 10, 1.0, evaluation=e), None)[-1].blocks for e in (0, 1)
    )
    assert first == second == made.blocks_at(4)


def test_masks_change_the_image_but_never_its_generator():
    name = "PixArtSigmaPipeline"
    pipe = deep_pipeline(name, extra=4)
    images, states = [], []
    before = torch.get_rng_state()
    for technique in (CFG(), S2Guidance(seed=0), S2Guidance(seed=1)):
        inputs = tiny_inputs(name, steps=4)
        with da.apply(pipe, technique):
            images.append(final(pipe, inputs))
        states.append(inputs["generator"][0].get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(images[1], images[2])
