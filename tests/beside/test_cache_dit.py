"""cache-dit beside sessions: the same image as with cache-dit alone, or as without it, or refused.

Its threshold is set so that the cache fires wherever it may; with a threshold of 0 it never does.
"""

import pytest
import torch

import diffalign as da
from diffalign.families import FAMILIES
from diffalign.seams.blocks.sites import sites
from diffalign.testing.deep import PIPELINES, deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs

SD3, PIXART, FLUX, WAN = (
    "StableDiffusion3Pipeline",
    "PixArtSigmaPipeline",
    "FluxPipeline",
    "WanPipeline",
)
NAMES = (SD3, PIXART, FLUX)
STEPS = 6
# the other families are in the full suite
ONE_QUICK = [SD3, *(pytest.param(name, marks=pytest.mark.slow) for name in (PIXART, FLUX, WAN))]


@pytest.fixture(autouse=True)
def _classes_are_put_back():
    """Whatever a test leaves enabled would be on the classes of the next one."""
    import diffusers
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline

    classes = [FakeDiffusionPipeline, *(getattr(diffusers, name) for name in (*NAMES, WAN))]
    before = [dict(vars(cls)) for cls in classes]
    yield
    for cls, members in zip(classes, before):
        for name in set(vars(cls)) - set(members):
            delattr(cls, name)
        if "__call__" in members:
            cls.__call__ = members["__call__"]


def enable(pipe, threshold=10.0, **options):
    import cache_dit

    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=2,
            residual_diff_threshold=threshold,
            **options,
        ),
    )


def disable(pipe):
    import cache_dit

    cache_dit.disable_cache(pipe)


def run(pipe, *techniques, batch=1, steps=STEPS, **more):
    name = type(pipe).__name__
    inputs = {**tiny_inputs(name, batch=batch, steps=steps), **more}
    if not techniques:
        return final(pipe, inputs)
    with da.apply(pipe, *techniques):
        return final(pipe, inputs)


def make(name):
    return deep_pipeline(name, PIPELINES.get(name, ""))


def blocks_computed(pipe):
    """Counts calls of the last block of each stack, which a cached call leaves out."""
    calls = []
    model = getattr(pipe, FAMILIES[type(pipe).__name__].denoisers[0])
    model.get_submodule(sites(model)[-1].name).register_forward_hook(lambda *_: calls.append(1))
    return calls


# -- when it is enabled ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_QUICK[:3])
def test_enabled_before_between_and_inside_sessions_and_disabled(name):
    pipe = make(name)
    cls, members = type(pipe), dict(vars(type(pipe)))
    plain = run(pipe)
    assert torch.equal(run(pipe, da.CFG()), plain)
    enable(pipe)  # between
    cached = run(pipe)
    assert not torch.equal(cached, plain)
    for _ in range(2):
        assert torch.equal(run(pipe, da.CFG()), cached)
    with da.apply(pipe, da.CFG()):
        assert torch.equal(run(pipe), cached)
        disable(pipe)  # inside
        assert torch.equal(run(pipe), plain)
        enable(pipe)
        assert torch.equal(run(pipe), cached)
    assert torch.equal(run(pipe), cached)
    assert type(pipe) is cls
    disable(pipe)
    assert dict(vars(cls)) == members
    assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe, da.CFG()), plain)


def test_the_call_that_gets_past_a_decorator_keeps_session_and_cache():
    pipe = make(SD3)
    enable(pipe)
    inputs = tiny_inputs(SD3, steps=3)
    with da.apply(pipe, da.CFG()) as session, torch.no_grad():
        type(pipe).__call__.__wrapped__(pipe, **inputs)
    assert session.report().steps == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), [(PIXART, STEPS), (FLUX, 2 * STEPS), (WAN, STEPS)])
def test_enabled_on_the_transformer_alone(name, calls):
    """Nobody begins anew for each image then, and sessions do."""
    pipe = make(name)
    enable(pipe)
    cached = run(pipe)
    disable(pipe)
    enable(pipe.transformer, num_inference_steps=calls)
    techniques = (da.CFG(), da.IntervalCFG(stop=0.5))
    first = [run(pipe, technique) for technique in techniques]
    assert torch.equal(first[0], cached)
    for technique, image in zip(techniques, first):
        assert torch.equal(run(pipe, technique), image)

    def switch_off(pipe, index, timestep, tensors):
        if index == STEPS - 1:
            disable(pipe.transformer)
        return tensors

    if name != PIXART:  # it has no such callback
        run(pipe, da.CFG(), callback_on_step_end=switch_off)
        assert "_context_manager" not in vars(pipe.transformer)
    disable(pipe.transformer)


# -- other rows and other passes -------------------------------------------------------------------


def skip_layer(**options):
    return da.SkipLayerGuidance(
        **{"scale": 3.0, "slg_scale": 1e-6, "layers": (1,), "start": 0.0, "stop": 1.0, **options}
    )


@pytest.mark.parametrize("name", ONE_QUICK)
def test_a_skip_layer_pass_of_no_weight_changes_nothing(name):
    pipe = make(name)
    computed = blocks_computed(pipe)
    enable(pipe)
    cached, native = run(pipe, da.CFG(3.0)), len(computed)
    computed.clear()
    image = run(pipe, skip_layer())
    scale = float(cached.abs().max())
    assert (image - cached).abs().max() <= 1e-4 * scale
    assert (
        native < len(computed) <= 2 * native
    )  # the extra pass has a cache of its own, which fires


@pytest.mark.parametrize("name", ONE_QUICK)
@pytest.mark.parametrize(
    "technique",
    [
        da.IntervalCFG(3.0, stop=0.5),
        da.IntervalCFG(3.0, start=0.5),
        da.AdaptiveGuidance(3.0, threshold=-1.0, space="x0", min_guided_steps=2),
        da.S2Guidance(3.0, blocks=(1, 2), start=0.0, stop=1.0),
        skip_layer(start=0.4, slg_scale=2.0),
        da.CFG(1.0),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_cache_that_never_fires_changes_nothing(name, technique):
    """Rows and passes change, and what cache-dit compares and keeps follows them."""
    pipe = make(name)
    plain = run(pipe, technique, batch=2)
    enable(pipe, threshold=1e-12)
    cached = run(pipe, technique, batch=2)
    assert torch.allclose(cached, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ONE_QUICK)
@pytest.mark.parametrize("stop", [0.5, 0.34])
def test_without_guidance_the_cache_begins_anew(name, stop):
    """From the step on that has one branch, the image is the plain one of a fresh cache."""
    pipe = make(name)
    computed = blocks_computed(pipe)
    enable(pipe, enable_separate_cfg=FAMILIES[name].mode == "sequential")
    image = run(pipe, da.IntervalCFG(3.0, stop=stop))
    assert torch.isfinite(image).all()
    guided, calls = round(STEPS * stop), 2 if FAMILIES[name].mode == "sequential" else 1
    warm = min(guided, 2) * calls + min(STEPS - guided, 2)
    assert len(computed) == warm


@pytest.mark.slow
@pytest.mark.parametrize(("name", "separate"), [(FLUX, True), (FLUX, False), (WAN, True)])
def test_branches_that_no_longer_take_turns_have_contexts_of_their_own(name, separate):
    pipe = make(name)
    enable(pipe, enable_separate_cfg=separate)
    native = run(pipe)
    assert torch.equal(run(pipe, da.CFG()), native)
    image = run(pipe, da.IntervalCFG(start=0.5))
    alone = run(pipe, da.IntervalCFG(sigma=(0.0, 1e-9)))
    assert torch.isfinite(image).all()
    assert not torch.equal(image, alone)
    assert torch.equal(run(pipe), native)


# -- attention -------------------------------------------------------------------------------------


def nag(**options):
    return da.NAG(4.0, **{"tau": 1.6, "alpha": 0.7, "sigma": (0.0, float("inf")), **options})


@pytest.mark.parametrize("name", ONE_QUICK[:3])
@pytest.mark.parametrize("window", [{}, {"sigma": None, "stop": 0.5}])
def test_attention_techniques(name, window):
    pipe = make(name)
    techniques = (nag(**window), da.PLADIS())
    plain = run(pipe, *techniques)
    options = {"enable_separate_cfg": True} if name == FLUX else {}
    enable(pipe, **options)
    native = run(pipe)
    cached = run(pipe, *techniques)
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, native)
    assert torch.equal(run(pipe), native)
    disable(pipe)
    enable(pipe, threshold=1e-12, **options)
    never = run(pipe, *techniques)
    assert torch.allclose(never, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_two_texts_in_one_cache_are_refused_by_name():
    pipe = make(FLUX)
    enable(pipe)
    with pytest.raises(da.UnsupportedModel, match=r"cache-dit.*enable_separate_cfg=True"):
        run(pipe, nag())
    pipe = deep_pipeline(FLUX, "embedded")  # one branch alone
    enable(pipe)
    inputs = {**tiny_inputs(FLUX, variant="embedded", steps=STEPS)}
    negative = {
        f"negative_{name}": -inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    with da.apply(pipe, nag(negative_embeds=negative)) as session:
        assert torch.isfinite(final(pipe, inputs)).all()
    assert session.report().layers["NAG"][0] > 0


@pytest.mark.slow
def test_the_published_layout_of_nag():
    """It copies the image stream at a block that cache-dit calls by position."""
    pipe = make(FLUX)
    plain = run(pipe, nag(share_image=False))
    enable(pipe, threshold=1e-12, enable_separate_cfg=True)
    cached = run(pipe, nag(share_image=False))
    assert torch.allclose(cached, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


# -- what it leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_blocks_keep_their_order(name):
    """cache-dit puts the lists of blocks back in another order than it found them."""
    pipe = make(name)
    before = sites(pipe.transformer)
    enable(pipe)
    run(pipe)
    assert sites(pipe.transformer) == before
    disable(pipe)
    assert sites(pipe.transformer) == before


def test_two_pipelines_of_one_class():
    one, two = make(SD3), make(SD3)
    plain = run(two, da.CFG())
    enable(one)
    with da.apply(two, da.CFG()):
        assert torch.equal(run(two), plain)
    cached = run(one, da.CFG())
    disable(one)
    assert not torch.equal(cached, plain)
    assert torch.equal(run(two, da.CFG()), plain)
