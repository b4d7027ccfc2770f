"""Tokens that are left out: the same predictions as a model that keeps all of them and caches."""

import functools

import pytest
import torch

import diffalign as da
from diffalign.families import FAMILIES
from diffalign.testing.beside.examples import weakened
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


def heads(attn, x):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def cached_attention(attn, cache, x, text, index):
    """One layer of SD3: queries are the text and the chosen image tokens, keys are all; what the
    others put out is what they last did. Returns the image's output, and the text's or None."""
    for name, project, norm in (("k", attn.to_k, attn.norm_k), ("v", attn.to_v, None)):
        fresh = heads(attn, project(x))
        fresh = fresh if norm is None else norm(fresh)
        for row, chosen in enumerate(index):
            cache[name][row][:, chosen] = fresh[row][:, chosen]
    outputs, texts = cache["out"], []
    for row, chosen in enumerate(index):
        q = attn.norm_q(heads(attn, attn.to_q(x[row : row + 1, chosen])))
        k, v = cache["k"][row : row + 1], cache["v"][row : row + 1]
        if text is not None:
            words = text[row : row + 1]
            q = torch.cat([q, attn.norm_added_q(heads(attn, attn.add_q_proj(words)))], 2)
            k = torch.cat([k, attn.norm_added_k(heads(attn, attn.add_k_proj(words)))], 2)
            v = torch.cat([v, heads(attn, attn.add_v_proj(words))], 2)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        outputs[row, chosen] = attn.to_out[0](mixed[0, : len(chosen)])
        texts.append(mixed[:, len(chosen) :])
    if text is None or attn.context_pre_only:
        return outputs, None
    return outputs, attn.to_add_out(torch.cat(texts))


def cached_block(block, cache, x, text, temb, index):
    """One block of SD3 with the residual stream of all tokens alive: attention and feed-forward of
    tokens that are not chosen are those of the step that chose them last."""
    h, gate, shift, scale, gate_ff, *dual = block.norm1(x, emb=temb)
    if block.context_pre_only:
        words = block.norm1_context(text, temb)
    else:
        words, *modulation = block.norm1_context(text, emb=temb)
    image, answer = cached_attention(block.attn, cache["attn"], h, words, index)
    x = x + gate[:, None] * image
    if dual:
        second, gate_two = dual
        image, _ = cached_attention(block.attn2, cache["attn2"], second, None, index)
        x = x + gate_two[:, None] * image
    fed = block.ff(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])
    for row, chosen in enumerate(index):
        cache["ff"][row, chosen] = fed[row, chosen]
    x = x + gate_ff[:, None] * cache["ff"]
    if block.context_pre_only:
        return x, None
    gate, shift, scale, gate_ff = (part[:, None] for part in modulation)
    text = text + gate * answer
    return x, text + gate_ff * block.ff_context(block.norm2_context(text) * (1 + scale) + shift)


@torch.no_grad()
def cached_step(model, caches, arguments, index):
    """The prediction of SD3 in tokens, written out from the card of the method: caches are filled
    where a token is chosen."""
    latents = arguments["hidden_states"]
    temb = model.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
    text = model.context_embedder(arguments["encoder_hidden_states"])
    x = model.pos_embed(latents)
    for number, block in enumerate(model.transformer_blocks):
        x, text = cached_block(block, caches[number], x, text, temb, index)
    tokens = model.proj_out(model.norm_out(x, temb))
    for row, chosen in enumerate(index):
        caches["noise"][row, chosen] = tokens[row, chosen]
    return caches["noise"].clone()


@pytest.mark.parametrize("variant", ["3.5", pytest.param("", marks=pytest.mark.slow)])
def test_equals_the_published_variant_written_out(variant):
    """Pruned tokens stay in the stream there, with cached attention and feed-forward outputs; what
    they carry reaches nobody."""
    pipe, sets = pipeline(SD3, variant), RandomSets()
    model = pipe.transformer
    with da.apply(pipe, sets), noted(model) as calls:
        final(pipe, inputs(SD3, variant))
    rows, tokens, width = 2 * BATCH, 16, model.inner_dim
    empty = functools.partial(torch.zeros, dtype=torch.float64)
    size = (rows, model.config.num_attention_heads, tokens, model.config.attention_head_dim)
    caches = {"noise": empty(rows, tokens, 64)}
    for number in range(len(model.transformer_blocks)):
        caches[number] = {"ff": empty(rows, tokens, width)}
        for name in ("attn", "attn2"):
            parts = {"k": empty(*size), "v": empty(*size), "out": empty(rows, tokens, width)}
            caches[number][name] = parts
    for step, (arguments, prediction) in enumerate(calls):
        index = [torch.arange(tokens)] * rows
        if step >= sets.start:
            index = [sets.of(step, row % BATCH, tokens) for row in range(rows)]
        expected = cached_step(model, caches, arguments, index)
        assert far(in_tokens(prediction, 2), expected) <= EXACT, f"step {step}"


@pytest.mark.slow
def test_a_compiled_model_has_two_graphs_for_each_piece():
    """One for all tokens and one for some, however many images and steps follow."""
    from torch._dynamo.utils import counters

    pipe, counts = tiny_pipeline(SD3), []
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile(backend="eager")
    try:
        for sets in (RandomSets(start=STEPS), RandomSets(), RandomSets()):
            with da.apply(pipe, sets):
                final(pipe, tiny_inputs(SD3, batch=BATCH, steps=STEPS))
            counts.append(counters["stats"]["unique_graphs"])
    finally:
        pipe.transformer._compiled_call_impl = None
        torch._dynamo.reset()
    full, both, again = counts
    assert 0 < full < both <= 2 * full
    assert again == both


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

    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == 3  # how diffusers says that a run ends
        return tensors

    with da.apply(pipe, RandomSets()) as session:
        final(pipe, inputs(SD3, "3.5", callback_on_step_end=interrupt))
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


def cut_off(pipe, index, timestep, tensors):
    """Guidance ends after the third step, as in diffusers' own callbacks."""
    if index == 2:
        pipe._guidance_scale = 0.0
        tensors = {name: value[-len(value) // 2 :] for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "more",
    [
        {
            "callback_on_step_end": cut_off,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
        },
        pytest.param({"skip_guidance_layers": [0]}, marks=pytest.mark.slow),
    ],
    ids=["cut off", "its own skipped layers"],
)
def test_beside_what_the_pipeline_does_itself(more):
    pipe, results = pipeline(SD3, "3.5"), []
    for tokens in ([], [RandomSets()]):
        with still(pipe) as predictions, da.apply(pipe, *tokens):
            final(pipe, inputs(SD3, "3.5", **more))
        results.append(predictions)
    for one, other in zip(*results, strict=True):
        assert far(other, one) <= EXACT


OTHERS = [
    name
    for name, family in FAMILIES.items()
    if family.tokens is not None and "ControlNet" not in name and name not in (SD3, ALPHA, SIGMA)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_on_every_pipeline_of_the_families(name):
    """Image-to-image, inpainting and control images, with and without guidance."""
    pipe, results = tiny_pipeline(name, dtype=torch.float64), []
    for tokens in ([], [RandomSets(start=1)]):
        with still(pipe) as predictions, da.apply(pipe, *tokens) as session:
            final(pipe, inputs(name, batch=1, steps=4))
        results.append(predictions)
    for one, other in zip(*results, strict=True):
        assert far(other, one) <= EXACT
    assert session.report().pruning["RandomSets"]["steps"] >= 2


@pytest.mark.slow
def test_beside_a_weaker_model():
    pipe = pipeline(SD3, "3.5")
    guidance, results = weakened(pipe), []
    for tokens in ([], [RandomSets()]):
        with still(pipe) as predictions, da.apply(pipe, guidance, *tokens):
            final(pipe, inputs(SD3, "3.5"))
        results.append(predictions)
    for one, other in zip(*results, strict=True):
        assert far(other, one) <= EXACT


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
