"""PLADIS inside real models: against dense weights written out in float64, its identities, and what
it leaves alone."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import diffalign as da
from diffalign.core import AttentionTechnique, Site
from diffalign.families import family_of
from diffalign.seams.plan import context_of, refusal
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

entmax = pytest.importorskip("entmax", reason="the independent package")
SPARSE = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}
NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    "SanaPipeline",
    "LTXPipeline",
    "WanPipeline",
    "WanImageToVideoPipeline",
    "Cosmos2TextToImagePipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "ChromaPipeline",
    "QwenImagePipeline",
    "CogVideoXPipeline",
    "Lumina2Pipeline",
    "ZImagePipeline",
]
# layers that see no text, or only text
SELF = ("attn1", "noise_refiner", "context_refiner")


def dense(q, k, v, mask, scale):
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
    return z, z.softmax(-1)


def written_out(strength, alpha, text_of):
    """Attention with every weight in hand: ``text_of(q, k)`` says where the text keys and the image
    queries are."""

    def attention(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        z, weights = dense(q, k, v, attn_mask, scale)
        for row, (text, image) in enumerate(text_of(q, k)):
            if text is None:
                continue
            block = z[row, :, image, text]
            block = block.masked_fill(block == -torch.inf, torch.finfo(block.dtype).min)
            sparse, mass = (
                SPARSE[alpha](block, dim=-1),
                weights[row, :, image, text].sum(-1, keepdim=True),
            )
            weights[row, :, image, text] = mass * (
                (1 - strength) * block.softmax(-1) + strength * sparse
            )
        return weights @ v

    return attention


def record(pipe, inputs, technique=None, names=("unet", "transformer")):
    seen = []

    def keep(module, given, output):
        value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        seen.append(torch.stack(value) if isinstance(value, list) else value.clone())

    handles = [
        part.register_forward_hook(keep)
        for name in names
        if (part := getattr(pipe, name, None)) is not None
    ]
    try:
        if technique is None:
            pipe(**inputs)
        else:
            with da.apply(pipe, technique) as session:
                pipe(**inputs)
            return seen, session.report()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def reference_call(name, pipe, attention_for):
    """Each attention layer's own calls of scaled_dot_product_attention replaced while it runs, by a
    plain patch of the function."""
    undo = []
    model = getattr(pipe, "unet", None) or pipe.transformer
    state = {"layer": None}
    for path, part in model.named_modules():
        if hasattr(part, "processor"):
            undo.append(
                part.register_forward_pre_hook(
                    lambda m, a, path=path: state.update(layer=path, call=0)
                )
            )
            undo.append(part.register_forward_hook(lambda m, a, o: state.update(layer=None)))
    original = F.scaled_dot_product_attention

    def patched(query, key, value, *args, **kwargs):
        layer, call = state["layer"], state.get("call", 0)
        state["call"] = call + 1
        ours = attention_for(layer, call) if layer else None
        return (ours or original)(query, key, value, *args, **kwargs)

    return patched, undo


def spans(name, given):
    """(text, image) of one row among the keys and the queries, from the pipeline's inputs alone."""
    length = len(given["prompt_embeds"][0])
    whole = slice(None)
    if name in ("StableDiffusion3Pipeline",):
        return lambda q: (slice(q.shape[-2] - length, q.shape[-2]), slice(0, q.shape[-2] - length))
    if name in ("FluxPipeline", "ChromaPipeline", "QwenImagePipeline", "CogVideoXPipeline"):
        return lambda q: (slice(0, length), slice(length, q.shape[-2]))
    if name == "Lumina2Pipeline":
        real = int(given["prompt_attention_mask"][0].sum())
        return lambda q: (slice(0, real), slice(real, q.shape[-2]))
    if name == "ZImagePipeline":
        return lambda q: (slice(q.shape[-2] - 32, q.shape[-2]), slice(0, q.shape[-2] - 32))
    return lambda q: (whole, whole)


@pytest.mark.parametrize("alpha", [1.5, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_weights_written_out(monkeypatch, name, alpha):
    """The prediction of every family, when its text weights are the paper's, computed with the
    entmax package in float64."""
    pipe = tiny_pipeline(name, dtype=torch.float64)
    model = getattr(pipe, "unet", None) or pipe.transformer
    torch.nn.Module.to(model, torch.float64)
    narrow = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)
    )

    def inputs():
        return tiny_inputs(name, batch=2, steps=2, guided=False, dtype=torch.float64)

    where = spans(name, inputs())

    def attention_for(layer, call):
        if any(part in layer for part in SELF) and name != "CogVideoXPipeline":
            return None
        if name == "StableDiffusion3Pipeline" and layer.endswith("attn2"):
            return None
        if name == "WanImageToVideoPipeline" and call == 0:  # its image keys
            return None
        return written_out(1.7, alpha, lambda q, k: [where(q)] * len(q))

    patched, undo = reference_call(name, pipe, attention_for)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", patched)
        expected = record(pipe, inputs())
    for handle in undo:
        handle.remove()
    plain = record(pipe, inputs())
    got, report = record(pipe, inputs(), da.PLADIS(1.7, alpha=alpha))
    assert report.layers["PLADIS"][0] == report.layers["PLADIS"][1] > 0
    assert (got[0] - expected[0]).abs().max() <= 1e-12 * expected[0].abs().max()
    assert (plain[0] - expected[0]).abs().max() > 1e-3 * expected[0].abs().max()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_strength_zero_is_the_plain_pipeline(name):
    pipe = tiny_pipeline(name)
    native = final(pipe, tiny_inputs(name))
    with da.apply(pipe, da.PLADIS(0.0)) as session:
        assert torch.equal(final(pipe, tiny_inputs(name)), native)
    assert session.report().layers["PLADIS"][0] == 0


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"]
)
def test_only_the_conditional_branch(name):
    """With ``branches="cond"`` the unconditional rows are those of the plain model, the others
    those of ``branches="both"``."""
    pipe = tiny_pipeline(name)
    inputs = {"batch": 2, "steps": 1}
    plain = record(pipe, tiny_inputs(name, **inputs))[0]
    both, _ = record(pipe, tiny_inputs(name, **inputs), da.PLADIS())
    cond, _ = record(pipe, tiny_inputs(name, **inputs), da.PLADIS(branches="cond"))
    c, u = (slice(0, 2), slice(2, 4)) if name == "ZImagePipeline" else (slice(2, 4), slice(0, 2))
    bound = (
        64 * torch.finfo(torch.float32).eps * plain.abs().max()
    )  # other row counts, other order of sums
    assert (cond[0][u] - plain[u]).abs().max() <= bound
    assert (cond[0][c] - both[0][c]).abs().max() <= bound
    assert (both[0][u] - plain[u]).abs().max() > 1e3 * bound


def test_window_and_layers():
    name = "StableDiffusionPipeline"
    pipe = tiny_pipeline(name)
    plain = record(pipe, tiny_inputs(name, steps=4))
    got, report = record(
        pipe, tiny_inputs(name, steps=4), da.PLADIS(start=0.5, layers=("up_blocks.*",))
    )
    changed = [not torch.equal(a, b) for a, b in zip(got, plain)]
    assert changed == [False, False, True, True]
    acting, selected = report.layers["PLADIS"]
    assert 0 < acting == selected < 4
    with (
        pytest.raises(da.UnsupportedModel, match="selects no attention layer"),
        da.apply(pipe, da.PLADIS(layers=("nothing.*",))),
    ):
        pipe(**tiny_inputs(name))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": 1.3}, ValueError, "alpha"),
        ({"strength": float("nan")}, ValueError, "strength"),
        ({"branches": "uncond"}, ValueError, "branches"),
        ({"layers": "up_blocks.*"}, TypeError, "layers"),
        ({"layers": ()}, ValueError, "layers"),
        ({"start": 0.7, "stop": 0.2}, ValueError, "start"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        da.PLADIS(**options)


def test_every_family_without_text_is_refused():
    with (
        pytest.raises(da.UnsupportedModel, match="no text"),
        da.apply(pipe := tiny_pipeline("DiTPipeline"), da.PLADIS()),
    ):
        pipe(**tiny_inputs("DiTPipeline"))
    context = context_of(pipe, family_of(type(pipe)))
    for technique in (da.NAG(), da.PLADIS()):
        assert "no text" in refusal(technique, context)


@dataclass(frozen=True, slots=True)
class Twice(AttentionTechnique):
    """What a plugin may write: attention that calls the next one twice and takes the mean."""

    def __call__(self, attend, q, k, v, site: Site):
        assert q.shape[:2] == k.shape[:2]
        assert site.tokens <= q.shape[2]
        return (attend(q, k, v) + attend(q, k, v)) / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_technique_that_changes_nothing_is_bit_identical(name):
    """Interception itself: the mean of twice the same is the same, on every family."""
    pipe = tiny_pipeline(name)
    native = final(pipe, tiny_inputs(name, steps=2))
    with da.apply(pipe, Twice()) as session:
        got = final(pipe, tiny_inputs(name, steps=2))
    assert torch.equal(got, native)
    acting, selected = session.report().layers["Twice"]
    assert 0 < acting == selected
