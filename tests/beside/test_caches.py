"""Feature caches of diffusers beside techniques that leave out rows, passes or blocks."""

import diffusers
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import diffalign as da
from diffalign.testing.deep import PIPELINES, deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs

WAN, FLUX, LTX, COG = "WanPipeline", "FluxPipeline", "LTXPipeline", "CogVideoXPipeline"
STEPS = 6
EVERYWHERE = (-1, 10001)


def pyramid():
    skips = {
        "spatial_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": EVERYWHERE,
        "cross_attention_timestep_skip_range": EVERYWHERE,
    }
    return PyramidAttentionBroadcastConfig(**skips, current_timestep_callback=lambda: 500)


def taylor_seer(**options):
    layers = [r".*blocks\.\d+\.attn\d?"]  # by default it finds none whose name ends in a number
    return TaylorSeerCacheConfig(cache_identifiers=layers, **options)


FIRING = {
    "first block": lambda: FirstBlockCacheConfig(threshold=1e6),
    "taylor seer": lambda: taylor_seer(cache_interval=2, disable_cache_before_step=1),
    "mag": lambda: MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
    "pyramid": pyramid,
}
NEVER = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.0),
    "taylor seer": lambda: taylor_seer(disable_cache_before_step=99),
    "mag": lambda: MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=1.0
    ),
}


def make(name, config=None):
    pipe = deep_pipeline(name, PIPELINES.get(name, ""))
    if config is not None:
        pipe.transformer.enable_cache(config)
    return pipe


def run(pipe, *techniques, batch=1, other=0.0):
    """``other``: added to the texts of the last image."""
    name = type(pipe).__name__
    inputs = tiny_inputs(name, batch=batch, steps=STEPS)
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        inputs[key][-1] += other
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session.report()


def skip_layer(**options):
    return da.SkipLayerGuidance(
        **{"scale": 3.0, "slg_scale": 1e-6, "layers": (1,), "start": 0.0, "stop": 1.0, **options}
    )


SKIPPING = {
    "interval": lambda: da.IntervalCFG(3.0, stop=0.5),
    "late interval": lambda: da.IntervalCFG(3.0, start=0.5),
    "adaptive": lambda: da.AdaptiveGuidance(3.0, threshold=-1.0, space="x0", min_guided_steps=2),
    "other blocks": lambda: da.S2Guidance(3.0, blocks=(1, 2), start=0.0, stop=1.0),
    "skip layer": lambda: skip_layer(slg_scale=2.0, start=0.4),
}


FAMILIES_ONE_QUICK = [
    COG,
    *(pytest.param(name, marks=pytest.mark.slow) for name in (WAN, FLUX, LTX)),
]


@pytest.mark.parametrize(
    "cache", ["first block", *(pytest.param(c, marks=pytest.mark.slow) for c in list(NEVER)[1:])]
)
@pytest.mark.parametrize("technique", SKIPPING)
@pytest.mark.parametrize("name", FAMILIES_ONE_QUICK)
def test_a_cache_that_never_fires_changes_nothing(name, technique, cache):
    plain, _ = run(make(name), SKIPPING[technique](), batch=2)
    cached, _ = run(make(name, NEVER[cache]()), SKIPPING[technique](), batch=2)
    assert torch.allclose(cached, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("cache", ["first block", "taylor seer", "mag"])
@pytest.mark.parametrize("name", FAMILIES_ONE_QUICK)
def test_an_extra_pass_of_no_weight_changes_nothing(name, cache):
    """It has a cache context of its own, so the cache of the other passes goes on firing."""
    plain, _ = run(make(name), da.CFG(3.0))
    cached, _ = run(make(name, FIRING[cache]()), da.CFG(3.0))
    image, _ = run(make(name, FIRING[cache]()), skip_layer())
    assert not torch.equal(cached, plain)
    assert (image - cached).abs().max() <= 1e-4 * cached.abs().max()


@pytest.mark.parametrize("cache", FIRING)
@pytest.mark.parametrize(
    "technique",
    [
        "interval",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("late interval", "adaptive", "other blocks")
        ),
    ],
)
@pytest.mark.parametrize("name", FAMILIES_ONE_QUICK)
def test_images_stay_apart(name, technique, cache):
    pipe = make(name, FIRING[cache]())
    (first, _), (second, _) = (run(pipe, SKIPPING[technique](), batch=2, other=x) for x in (0, 1))
    assert torch.isfinite(first).all()
    assert not torch.equal(first[1], second[1])
    assert (first[0] - second[0]).abs().max() <= 1e-5 * first.abs().max()


def test_every_cache_of_diffusers_is_known():
    """A new one must be sorted: one state for each cache context, or one for all."""
    from diffalign.seams.denoiser.cache import KEYED

    names = {
        name
        for name in dir(diffusers)
        if name.endswith("CacheConfig") or name == "PyramidAttentionBroadcastConfig"
    }
    assert names == {*KEYED, "FasterCacheConfig", "PyramidAttentionBroadcastConfig"}
