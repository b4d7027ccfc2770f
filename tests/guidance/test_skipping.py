"""What S2-Guidance and skip-layer guidance share: windows, refusals, and the rest of a pipeline."""

import dataclasses
import math

import pytest
import torch

import diffalign as da
from diffalign.core import Context, StepInfo, UnsupportedModel
from diffalign.families import FAMILIES
from diffalign.guidance import CFG
from diffalign.guidance.s2_guidance import S2Guidance
from diffalign.guidance.skip_layer_guidance import SkipLayerGuidance
from diffalign.seams.blocks.sites import sites
from diffalign.testing.deep import deep_pipeline, without_block
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

EVERYWHERE = {"start": 0.0, "stop": 1.0}
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
SD = "StableDiffusionPipeline"


def call(pipe, technique, name, variant="", **options):
    scale = options.pop("scale", 4.0)
    inputs = tiny_inputs(
        name, variant=variant, steps=options.pop("steps", 2), batch=options.pop("batch", 1)
    )
    with da.apply(pipe, technique) as session:
        return final(pipe, {**inputs, FAMILIES[name].gates[0]: scale, **options}), session.report()


def resolved(technique, steps=10):
    return technique.resolve(Context("P", "oracle", "model", "S", 3.0, "call", steps, 1))


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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "blocks"])
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
    "name",
    [
        SD,
        "FluxPipeline",
        pytest.param("StableDiffusion3Pipeline", marks=pytest.mark.slow),
        pytest.param("PixArtSigmaPipeline", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["nag", "pladis", "both"])
@pytest.mark.few(2)
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
