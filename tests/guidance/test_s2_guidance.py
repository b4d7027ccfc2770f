"""S2-Guidance and SkipLayerGuidance against models that really lack the block, SD3's own skip-layer
code, and their off switches."""

import collections
import dataclasses
import math

import pytest
import torch

import diffalign as da
from diffalign.core import COND, UNCOND, Context, StepInfo, UnsupportedModel
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


class TestSkipLayerGuidance(GuidanceContract):
    def make(self):
        return SkipLayerGuidance(3.0, layers=(7, 8, 9), start=0.0, stop=0.5)

    def off(self):
        return SkipLayerGuidance(3.0, layers=(7,), slg_scale=0.0, stop=1.0), CFG(3.0)

    def rows(self, steps, batch):
        return batch * (2 * steps + steps // 2)


def call(pipe, technique, name, variant="", **options):
    scale = options.pop("scale", 4.0)
    inputs = tiny_inputs(
        name, variant=variant, steps=options.pop("steps", 2), batch=options.pop("batch", 1)
    )
    with da.apply(pipe, technique) as session:
        return final(pipe, {**inputs, FAMILIES[name].gates[0]: scale, **options}), session.report()


# Formula


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


@pytest.mark.parametrize(("name", "variant"), AFFINE.items())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_layer_guidance_is_sd3s_own(dtype):
    """Bit for bit. The pipeline acts for 0.01 * 4 < index < 0.8 * 4, that is at steps 1 to 3."""
    name = "StableDiffusion3Pipeline"
    pipe = deep_pipeline(name).to(dtype)

    def inputs():
        return {**tiny_inputs(name, dtype=dtype, steps=4, batch=2), "guidance_scale": 4.0}

    plain = final(pipe, inputs())
    native = final(
        pipe,
        {
            **inputs(),
            "skip_guidance_layers": [1, 2],
            "skip_layer_guidance_scale": 1.7,
            "skip_layer_guidance_stop": 0.8,
        },
    )
    technique = SkipLayerGuidance(layers=(1, 2), slg_scale=1.7, start=0.25, stop=1.0)
    with da.apply(pipe, technique) as session:
        assert torch.equal(final(pipe, inputs()), native)
    assert session.report().rows == 2 * (2 + 3 * 3)
    assert not torch.equal(native, plain)
    assert torch.equal(final(pipe, inputs()), plain)


# Off switches


@pytest.mark.parametrize(("name", "variant"), PIPELINES.items())
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


@pytest.mark.parametrize(("name", "variant"), PIPELINES.items())
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


# Masks


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


# Windows and arguments


def guided_steps(technique, count):
    return [
        i
        for i in range(count)
        if len(resolved(technique, count).passes(StepInfo(i, count, 1.0), None)) == 3
    ]


def test_windows():
    assert guided_steps(S2Guidance(2.0, blocks=(1,)), 10) == list(range(1, 9))  # central 80%
    assert guided_steps(SkipLayerGuidance(2.0, layers=[1]), 28) == list(range(5))  # step 0 included
    assert guided_steps(SkipLayerGuidance(2.0, layers=[1], start=0.0), 28)[0] == 0
    band = S2Guidance(2.0, blocks=(1,), sigma=(0.3, 0.8))
    sizes = [
        len(resolved(band).passes(StepInfo(0, 10, sigma), None)) for sigma in (0.29, 0.3, 0.79, 0.8)
    ]
    assert sizes == [2, 3, 3, 2]
    assert dataclasses.replace(band, omega=0.5).sigma == (0.3, 0.8)
    with pytest.raises(UnsupportedModel, match="none of 4 steps lies in the window"):
        resolved(SkipLayerGuidance(2.0, layers=(1,)), 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2Guidance(omega=None), "omega"),
        (lambda: S2Guidance(omega=math.inf), "omega"),
        (lambda: S2Guidance(scale=math.nan), "scale"),
        (lambda: S2Guidance(n_drop=-1), "n_drop"),
        (lambda: S2Guidance(seed=1.5), "seed"),
        (lambda: S2Guidance(blocks=()), "blocks"),
        (lambda: S2Guidance(start=0.9, stop=0.1), "start"),
        (lambda: S2Guidance(sigma=(0.2, 0.1)), "sigma"),
        (lambda: SkipLayerGuidance(layers=()), "layers"),
        (lambda: SkipLayerGuidance(slg_scale="2"), "slg_scale"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refusals_say_what_to_do():
    pipe = tiny_pipeline("PixArtSigmaPipeline")
    with pytest.raises(UnsupportedModel, match=r"only 2 blocks.*Pass blocks="):
        call(pipe, S2Guidance(), "PixArtSigmaPipeline")
    with pytest.raises(UnsupportedModel, match=r"n_drop=3.*only 2 blocks"):
        call(pipe, S2Guidance(n_drop=3, blocks=("*",)), "PixArtSigmaPipeline")
    with pytest.raises(UnsupportedModel, match=r"only SD3\.5 medium has published ones"):
        call(pipe, SkipLayerGuidance(), "PixArtSigmaPipeline", steps=30)
    named = {support.name: support for support in da.supports(pipe)}
    assert not named["s2-guidance"].works
    assert not named["skip-layer-guidance"].works
    assert named["s2-guidance"].reason
    assert {s.name: s.works for s in da.supports(tiny_pipeline(SD))}["s2-guidance"]


def test_published_layers_of_sd35_medium():
    pipe = deep_pipeline("StableDiffusion3Pipeline", "3.5", extra=22)
    pipe.transformer.register_to_config(num_layers=24)
    made, report = call(pipe, SkipLayerGuidance(), "StableDiffusion3Pipeline", steps=10)
    assert report.resolved["skip-layer-guidance"]["layers"] == (
        (7, 8, 9),
        "published for SD3.5 medium",
    )
    assert report.rows == 2 * 10 + 2
    assert made.isfinite().all()


def test_both_stacks_of_flux_can_be_named():
    pipe = deep_pipeline("FluxPipeline")
    seen = []
    for layer in ("transformer_blocks.1", "single_transformer_blocks.1", 1, 4):
        seen.append(call(pipe, SkipLayerGuidance(layers=(layer,), **EVERYWHERE), "FluxPipeline")[0])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_a_list_of_layers_is_one_pass():
    """Two layers are two blocks missing from one pass, not two passes."""
    pipe = deep_pipeline("PixArtSigmaPipeline")
    out, report = call(
        pipe, SkipLayerGuidance(1.0, layers=(1, 2), **EVERYWHERE), "PixArtSigmaPipeline", steps=1
    )
    assert report.rows == 2
    cond, _ = call(pipe, CFG(1.0), "PixArtSigmaPipeline", steps=1)
    lacking = without_block(without_block(pipe, "transformer_blocks.2"), "transformer_blocks.1")
    skipped, _ = call(lacking, CFG(1.0), "PixArtSigmaPipeline", steps=1)
    expected = cond.double() + 2.8 * (cond.double() - skipped.double())
    assert (out - expected).abs().max() <= 256 * torch.finfo(torch.float32).eps * out.abs().max()


# With the rest of a pipeline


def test_an_exception_in_the_loop_restores_everything():
    pipe = tiny_pipeline(SD)
    native, _ = call(pipe, CFG(), SD)
    kinds = [type(m) for m in pipe.unet.modules()]
    error = RuntimeError("stop")

    def fail(*_):
        if type(pipe.unet.get_submodule(MIDDLE)) not in kinds:  # only during the skipped pass
            raise error

    hook = pipe.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        call(pipe, SkipLayerGuidance(layers=(MIDDLE,), **EVERYWHERE), SD)
    hook.remove()
    assert [type(m) for m in pipe.unet.modules()] == kinds
    assert torch.equal(call(pipe, CFG(), SD)[0], native)


def test_both_experts_of_wan_skip_their_own_blocks():
    pipe = deep_pipeline("WanPipeline", "2.2")
    on, report = call(pipe, S2Guidance(**EVERYWHERE), "WanPipeline", "2.2", steps=4)
    plain, base = call(pipe, CFG(), "WanPipeline", "2.2", steps=4)
    assert report.rows == 12
    assert base.rows == 8
    assert not torch.equal(on, plain)
    assert {"s2-guidance", "s2-guidance [transformer_2]"} <= set(report.resolved)


def test_heun_uses_one_mask_per_step():
    from diffusers import HeunDiscreteScheduler

    pipe = tiny_pipeline(SD)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    _, report = call(pipe, S2Guidance(**EVERYWHERE), SD, steps=3)
    assert report.rows == 3 * (2 * 3 - 1)  # Heun evaluates twice at all steps but the last


@pytest.mark.parametrize("how", [pytest.param("module", marks=pytest.mark.slow), "blocks"])
def test_compiled(how):
    from torch._dynamo.testing import CompileCounter

    name = "PixArtSigmaPipeline"
    technique = S2Guidance(**EVERYWHERE)
    eager, _ = call(deep_pipeline(name, extra=2), technique, name, steps=4)
    torch._dynamo.reset()
    pipe, counter = deep_pipeline(name, extra=2), CompileCounter()
    if how == "module":
        pipe.transformer.compile(backend=counter)
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=counter)
    once, report = call(pipe, technique, name, steps=4)
    count = counter.frame_count
    assert torch.equal(once, eager)
    assert report.rows == 12
    assert torch.equal(
        call(pipe, dataclasses.replace(technique, seed=9), name, steps=4)[0].isfinite(),
        torch.ones_like(once).bool(),
    )
    assert counter.frame_count == count  # other masks, no other graph


def test_first_block_cache_keeps_the_skipped_pass_apart():
    """At threshold 0 the cache never reuses anything, so the result is that without a cache;
    branches share no state."""
    from diffusers import FirstBlockCacheConfig

    name = "WanPipeline"
    pipe = deep_pipeline(name)
    truth, _ = call(pipe, S2Guidance(**EVERYWHERE), name, steps=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    out, report = call(pipe, S2Guidance(**EVERYWHERE), name, steps=4)
    assert report.rows == 12
    assert torch.equal(out, truth)
    pipe.transformer.disable_cache()


@pytest.mark.parametrize(
    "name", [SD, "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"]
)
@pytest.mark.parametrize("kind", ["nag", "pladis", "both"])
def test_with_attention_techniques(name, kind):
    """All three passes run under them: the formula holds between runs that have them, the third
    lacking the block."""
    made = {
        "nag": (da.NAG(3.0, tau=2.5, alpha=0.5, sigma=(0.0, math.inf)),),
        "pladis": (da.PLADIS(1.5),),
    }
    others = made["nag"] + made["pladis"] if kind == "both" else made[kind]
    pipe = deep_pipeline(name)
    attribute = FAMILIES[name].denoisers[0]
    block = [site.name for site in sites(getattr(pipe, attribute)) if site.edge is None][-1]

    def final_of(which, *techniques):
        with da.apply(which, *techniques) as session:
            inputs = {**tiny_inputs(name, steps=1), FAMILIES[name].gates[0]: 4.0}
            return final(which, inputs).double(), session.report()

    on, report = final_of(pipe, S2Guidance(4.0, omega=2.0, blocks=(block,), **EVERYWHERE), *others)
    cfg, base = final_of(pipe, CFG(4.0), *others)
    cond, _ = final_of(pipe, CFG(1.0), *others)
    skipped, _ = final_of(without_block(pipe, block), CFG(1.0), *others)
    expected = cfg + 2.0 * (cond - skipped)
    bound = (
        64
        * torch.finfo(torch.float32).eps
        * max(value.abs().max().item() for value in (cfg, cond, skipped))
    )
    assert (on - expected).abs().max() <= bound
    assert (expected - cfg).abs().max() > 20 * bound
    assert (report.rows, report.layers) == (base.rows + 1, base.layers)


def test_with_a_controlnet():
    name = "StableDiffusionControlNetPipeline"
    pipe = tiny_pipeline(name)

    def final_of(which, technique):
        with da.apply(which, technique) as session:
            return final(
                which, {**tiny_inputs(name, steps=1, batch=2), "guidance_scale": 4.0}
            ).double(), session.report()

    on, report = final_of(pipe, S2Guidance(4.0, omega=2.0, blocks=(MIDDLE,), **EVERYWHERE))
    assert report.rows == 6
    cfg, cond, skipped = (
        final_of(*pair)[0]
        for pair in ((pipe, CFG(4.0)), (pipe, CFG(1.0)), (without_block(pipe, MIDDLE), CFG(1.0)))
    )
    expected = cfg + 2.0 * (cond - skipped)
    bound = (
        64
        * torch.finfo(torch.float32).eps
        * max(value.abs().max().item() for value in (cfg, cond, skipped))
    )
    assert (on - expected).abs().max() <= bound
    assert (expected - cfg).abs().max() > 20 * bound
