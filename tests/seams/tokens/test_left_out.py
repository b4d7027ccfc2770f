"""Tokens that are left out: the same predictions as a model that keeps all of them and caches."""

import functools

import pytest
import torch

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.left_out import CachedKeys, RandomSets, in_tokens, noted, still
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD3, FLUX, CHROMA = "StableDiffusion3Pipeline", "FluxPipeline", "ChromaPipeline"
ALPHA, SIGMA, QWEN = "PixArtAlphaPipeline", "PixArtSigmaPipeline", "QwenImagePipeline"
MODELS = [
    (SD3, "3.5"),
    pytest.param(FLUX, "", marks=pytest.mark.slow),
    pytest.param(SD3, "", marks=pytest.mark.slow),
    pytest.param(CHROMA, "", marks=pytest.mark.slow),
    pytest.param(ALPHA, "", marks=pytest.mark.slow),
    pytest.param(SIGMA, "", marks=pytest.mark.slow),
    pytest.param(QWEN, "", marks=pytest.mark.slow),
]
SEQUENTIAL = (FLUX, CHROMA, QWEN)
STEPS, BATCH = 6, 2
ALWAYS = (0.0, float("inf"))
# sums in another order: some last places of float64 through a few layers
EXACT = 1e-11


@functools.cache
def pipeline(name, variant=""):
    return tiny_pipeline(name, variant=variant, dtype=torch.float64)


def inputs(name, variant="", batch=BATCH, steps=STEPS, **more):
    given = tiny_inputs(name, variant=variant, dtype=torch.float64, batch=batch, steps=steps)
    return {**given, **more}


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("name", "variant"), MODELS)
def test_equals_the_cached_variant_at_full_length(name, variant):
    """Every call of the model, replayed with all tokens and cached keys and values."""
    pipe, sets = pipeline(name, variant), RandomSets()
    model = pipe.transformer
    with da.apply(pipe, sets) as session, noted(model) as calls:
        final(pipe, inputs(name, variant))
    patch = model.config.patch_size
    tokens = in_tokens(calls[0][1], patch).shape[1]
    mode, branches = CachedKeys(tokens, name in SEQUENTIAL), 1 + (name in SEQUENTIAL)
    last = {}
    for number, (arguments, prediction) in enumerate(calls):
        step, branch = divmod(number, branches)
        rows = len(prediction)
        index = None
        if step >= sets.start:
            index = torch.stack([sets.of(step, row % BATCH, tokens) for row in range(rows)])
        first = calls[branch][0]  # its masks are those of all tokens
        arguments |= {key: first[key] for key in ("attention_mask",) if key in first}
        mode.begin(branch, index)
        with mode, torch.no_grad():
            full = in_tokens(model(**{**arguments, "return_dict": False})[0], patch)
        if index is not None:
            place = index[..., None].expand(-1, -1, full.shape[-1])
            full = last[branch].scatter(1, place, full.gather(1, place))
        last[branch] = full
        assert far(in_tokens(prediction, patch), full) <= EXACT, f"call {number}"
    assert len(calls) == STEPS * branches
    facts = session.report().pruning["RandomSets"]
    assert (facts["steps"], facts["tokens"]) == (STEPS - 2, tokens)
    assert facts["computed"] == int(0.4 * tokens)


def test_nothing_is_left_behind_and_the_caches_are_gone():
    pipe = pipeline(SD3, "3.5")
    plain = final(pipe, inputs(SD3, "3.5"))
    classes = {module: type(module) for module in pipe.transformer.modules()}
    with da.apply(pipe, RandomSets()) as session:
        pruned = final(pipe, inputs(SD3, "3.5"))
        assert not torch.equal(pruned, plain)
        assert not session.states

    def stop(pipe, index, timestep, tensors):
        if index == 3:
            raise KeyboardInterrupt
        return tensors

    with da.apply(pipe, RandomSets()) as session:
        arguments = inputs(SD3, "3.5", callback_on_step_end=stop)
        with pytest.raises(KeyboardInterrupt):
            final(pipe, arguments)
    assert not session.states
    assert {module: type(module) for module in pipe.transformer.modules()} == classes
    assert torch.equal(final(pipe, inputs(SD3, "3.5")), plain)


TECHNIQUES = {
    "cfg": lambda: [da.CFG(4.0)],
    "interval": lambda: [da.IntervalCFG(start=0.4, stop=0.7)],
    "adaptive": lambda: [da.AdaptiveGuidance(threshold=-1.0, min_guided_steps=3)],
    "off": lambda: [da.CFG(1.0)],
    "negative": lambda: [da.CFG(0.0)],
    "s2": lambda: [da.S2Guidance(blocks=("*",), start=0.0, stop=1.0)],
    "skip": lambda: [da.SkipLayerGuidance(layers=(0,), start=0.0, stop=1.0)],
    "pag": lambda: [da.PAG()],
    "nag": lambda: [da.NAG(4.0, tau=1.6, alpha=0.7, sigma=ALWAYS)],
    "nag late": lambda: [da.NAG(4.0, tau=1.6, alpha=0.7, start=0.6, stop=1.0)],
    "nag early": lambda: [da.NAG(4.0, tau=1.6, alpha=0.7, start=0.0, stop=0.6)],
    "published nag": lambda: [da.NAG(4.0, norm="l2", share_image=False, sigma=ALWAYS)],
    "pladis": lambda: [da.PLADIS()],
    "all": lambda: [
        da.APG(3.0),
        da.NAG(4.0, tau=1.6, alpha=0.7, sigma=ALWAYS),
        da.PLADIS(branches="cond"),
    ],
}
ONLY_FLUX = "published nag"
# their number of text tokens changes in the run, and with it what every token should be
CHANGING = ("nag late", "nag early")
BESIDE = [
    (SD3, "3.5", "all"),
    *(
        pytest.param(SD3, "3.5", key, marks=pytest.mark.slow)
        for key in TECHNIQUES
        if key not in ("all", ONLY_FLUX)
    ),
    *(
        pytest.param(name, "", key, marks=pytest.mark.slow)
        for name in (FLUX, CHROMA, SIGMA, QWEN)
        for key in ("interval", "nag", "nag late", "pladis")
    ),
    pytest.param(FLUX, "", ONLY_FLUX, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "variant", "techniques"), BESIDE)
def test_beside_every_kind_of_technique(name, variant, techniques):
    """Where time and latents stand still, what is left out is what would be computed."""
    pipe, make = pipeline(name, variant), TECHNIQUES[techniques]
    sets = RandomSets(1.0 if techniques in CHANGING else 0.4)
    results = []
    for tokens in ([], [sets]):
        with still(pipe) as predictions, da.apply(pipe, *make(), *tokens) as session:
            final(pipe, inputs(name, variant))
        results.append(predictions)
    plain, pruned = results
    assert len(plain) == len(pruned) >= STEPS
    for one, other in zip(plain, pruned, strict=True):
        assert far(other, one) <= EXACT
    assert session.report().pruning["RandomSets"]["steps"] > 0
