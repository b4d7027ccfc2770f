"""NAG and PLADIS together and with guidance: what they leave behind, and who notices."""

import threading

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance
from torch.nn import functional as F

import diffalign as da
from diffalign.core.registry import make
from diffalign.core.registry import techniques as registered
from diffalign.families import FAMILIES
from diffalign.guidance import IntervalCFG
from diffalign.guidance.linear_ag import identity_of
from diffalign.guidance.linear_policy import LinearPolicy
from diffalign.seams import swap
from diffalign.testing.calls import model_of, nag, run
from diffalign.testing.final import final
from diffalign.testing.lockstep import paper, walk
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_recipe

SD, XL, SD3, FLUX, WAN, QWEN = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "QwenImagePipeline",
)
# one class of each family whose text layers are known
EVERY = list(
    {family.name: name for name, family in reversed(FAMILIES.items()) if family.attention}.values()
)
EPS = torch.finfo(torch.float32).eps


def footprint(pipe):
    """Everything a technique might leave behind: classes, processors, attributes, hooks."""
    model = model_of(pipe)
    return {
        name: (
            type(m),
            dict(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            id(getattr(m, "processor", None)),
        )
        for name, m in model.named_modules()
    }


def assert_untouched(pipe, before):
    after = footprint(pipe)
    assert after.keys() == before.keys()
    for name, (cls, attributes, *rest) in before.items():
        assert after[name][0] is cls
        assert after[name][1].keys() == attributes.keys()
        assert all(after[name][1][key] is value for key, value in attributes.items()), name
        assert after[name][2:] == tuple(rest)


class Written:
    """SD cross-attention with PLADIS in plain arithmetic, as a processor of the user's own."""

    def __init__(self, sparse, strength):
        self.sparse, self.strength = sparse, strength

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        q, k, v = (
            attn.to_q(hidden_states),
            attn.to_k(encoder_hidden_states),
            attn.to_v(encoder_hidden_states),
        )
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        z = q @ k.transpose(-1, -2) * attn.scale
        weights = (1 - self.strength) * z.softmax(-1) + self.strength * self.sparse(z, dim=-1)
        return attn.to_out[1](attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2)))


def test_pladis_acts_inside_nag_on_each_text_alone():
    """Lock-step models whose every text layer is PLADIS, guided by NAG; the user's order of
    techniques does not matter."""
    entmax15 = pytest.importorskip("entmax").entmax15
    pipe = tiny_pipeline(SD, dtype=torch.float64)
    seen = []
    given = tiny_inputs(SD, batch=2, steps=1, guided=False, dtype=torch.float64)
    handle = pipe.unet.register_forward_hook(
        lambda m, a, k, o: seen.append((a, k, o[0])), with_kwargs=True
    )
    for techniques in ([nag(), da.PLADIS(1.7)], [da.PLADIS(1.7), nag()]):
        run_inputs = tiny_inputs(SD, batch=2, steps=1, guided=False, dtype=torch.float64)
        with da.apply(pipe, *techniques):
            final(pipe, run_inputs)
    final(pipe, tiny_inputs(SD, batch=2, steps=1, guided=False, dtype=torch.float64))
    handle.remove()
    assert torch.equal(seen[0][2], seen[1][2])
    args, kwargs, _ = seen[2]
    positive = {"sample": args[0], "timestep": args[1], **kwargs}
    negative = {**positive, "encoder_hidden_states": given["negative_prompt_embeds"]}
    written = {
        name: Written(entmax15, 1.7) if "attn2" in name else processor
        for name, processor in pipe.unet.attn_processors.items()
    }
    pipe.unet.set_attn_processor(written)
    expected, _ = walk(
        pipe.unet,
        tiny_recipe(SD).hooks,
        positive,
        negative,
        lambda a, b, layer: paper(a, b, 3.0, 1.6, 0.7),
    )
    assert (seen[0][2] - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.few(4)
def test_off_or_removed_means_untouched(name):
    pipe = tiny_pipeline(name)
    native, _ = run(pipe, name)
    before = footprint(pipe)
    for off in ((nag(1.0), da.PLADIS(0.0)), (nag(alpha=0.0),)):
        got, report = run(pipe, name, *off)
        assert torch.equal(got, native)
        assert all(acting == 0 < selected for acting, selected in report().layers.values())
        assert_untouched(pipe, before)
    got, _ = run(pipe, name, nag(), da.PLADIS())
    assert not torch.equal(got, native)
    assert_untouched(pipe, before)
    assert torch.equal(run(pipe, name)[0], native)


@pytest.mark.parametrize(
    "error", [RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.few(4)
def test_interrupted_in_the_middle_means_untouched(name, error):
    """In the second call of a layer's projection, with block skipping, checkpointing and another
    backend to put back as well."""
    pipe = tiny_pipeline(name)
    model = model_of(pipe)
    if getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()
    if name == SD:
        pipe.enable_attention_slicing(1)  # something to switch, and to switch back
    elif hasattr(model, "set_attention_backend") and name in (FLUX, QWEN, WAN):
        model.set_attention_backend("_native_math")
    native, _ = run(pipe, name)
    before = footprint(pipe)
    layers = [m for m in model.modules() if hasattr(m, "processor")]
    processor, count = layers[-1].processor, []

    def fail(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise error("stop")

    handle = layers[-1].to_q.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        run(pipe, name, da.S2Guidance(3.0, blocks=(0,), start=0.0, stop=1.0), nag(), da.PLADIS())
    handle.remove()
    assert layers[-1].processor is processor
    assert_untouched(pipe, before)
    assert torch.equal(run(pipe, name)[0], native)


def test_another_thread_that_shares_the_model_never_notices():
    pipe, other = tiny_pipeline(SD), tiny_pipeline(SD)
    other.unet = pipe.unet
    native, _ = run(other, SD)
    results, inside = [], threading.Event()
    first = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))

    def hook(*_):
        if threading.current_thread() is threading.main_thread() and not inside.is_set():
            inside.set()
            worker.start()
            worker.join()

    worker = threading.Thread(target=lambda: results.append(run(other, SD)[0]))
    handle = first.to_out[0].register_forward_hook(hook)
    run(pipe, SD, nag(), da.PLADIS())
    handle.remove()
    assert torch.equal(results[0], native)


class Later:
    """A judge that likes later candidates better."""

    sees = "x0"

    def score(self, latents, sigma, rows):
        return torch.arange(float(len(rows)))


OPTIONS = {
    "skip-layer-guidance": {"scale": 3.0, "layers": ("down_blocks.0*",), "start": 0.0, "stop": 0.5},
    "cfg-plus-plus": {},
    "dynamic-cfg": {"scale": 3.0, "candidates": (1.0, 4.0), "evaluators": (Later(),)},
}
GUIDANCES = [name for name, cls in registered().items() if cls.seam == "denoiser"]


def policy(pipe, folder):
    """Of LinearAG for four steps; the second estimates, as a mean of what came before."""
    identity = identity_of(pipe, 4, 3.0, (4, 8, 8), "")
    weights = {1: torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)}
    LinearPolicy(
        identity, ("guided", "estimated", "guided", "conditional"), weights, {}, {}, 0
    ).save(folder / "policy")
    return {"scale": 3.0, "policy": str(folder / "policy")}


@pytest.mark.parametrize("name", [*GUIDANCES, "a guider of diffusers"])
@pytest.mark.few(4)
def test_every_guidance(name, tmp_path):
    """Each guidance with NAG and PLADIS: all layers act, the rows are the guidance's own, and NAG
    makes a difference."""
    model = SD3 if name == "cfg-zero-star" else SD
    pipe = tiny_pipeline(model)
    if name in registered():
        options = OPTIONS.get(name, {"scale": 3.0})
        if name == "linear-ag":
            options = policy(pipe, tmp_path)
        elif name == "auto-guidance":
            options = {"scale": 3.0, "weak": tiny_pipeline(model, seed=1).unet}
        technique = make(name, options)
    else:
        technique = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
    plain, alone = run(pipe, model, technique, num_inference_steps=4)
    before = footprint(pipe)
    got, report = run(pipe, model, technique, nag(), da.PLADIS(), num_inference_steps=4)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, plain)
    assert all(acting == selected > 0 for acting, selected in report().layers.values())
    changes = {"pag": {"IdentityMaps"}, "seg": {"BlurredQueries"}}.get(name, set())
    assert report().layers.keys() == {"NAG", "PLADIS"} | changes
    if name != "adaptive-guidance":  # whose decision depends on the predictions
        assert report().rows == alone().rows
    assert_untouched(pipe, before)
    off, report = run(pipe, model, technique, nag(1.0), da.PLADIS(0.0), num_inference_steps=4)
    assert torch.equal(off, plain)
    assert report().rows == alone().rows


@pytest.mark.parametrize("guidance", [da.CFG(3.0), da.CFG(1.0)], ids=["CFG", "off"])
@pytest.mark.parametrize("name", [SD, FLUX, "ZImagePipeline"])
@pytest.mark.few(2)
def test_guidance_of_ours_sees_the_same_predictions(name, guidance):
    """NAG under our CFG equals NAG under the pipeline's own, bit for bit."""
    pipe = tiny_pipeline(name)
    gate = "true_cfg_scale" if name == FLUX else "guidance_scale"
    off = guidance.scale == 1.0
    native = {gate: (guidance.scale - 1.0 if name == "ZImagePipeline" else guidance.scale)}
    got, report = run(pipe, name, guidance, nag(), da.PLADIS(), **native)
    expected, _ = run(pipe, name, nag(), da.PLADIS(), **native)
    assert torch.equal(got, expected)
    two_rows = name == "ZImagePipeline"
    assert report().nfe == 2 * (2 - off + two_rows)


def test_guidance_that_skips_the_branch_at_some_steps():
    pipe = tiny_pipeline(SD)
    with da.apply(pipe, IntervalCFG(3.0, stop=0.5), nag(), da.PLADIS(branches="cond")) as session:
        got = final(pipe, tiny_inputs(SD, batch=2, steps=4))
    report = session.report()
    assert 0 < report.guided_steps < report.steps
    assert report.layers == {"NAG": (4, 4), "PLADIS": (4, 4)}
    assert torch.isfinite(got).all()


def test_the_global_generator_is_left_alone():
    pipe = tiny_pipeline(SD, text=True)
    state = torch.get_rng_state()
    with da.apply(pipe, nag(negative_prompt="low quality"), da.PLADIS()):
        final(pipe, tiny_inputs(SD, text=True, steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_interception_is_of_this_call_only():
    """Calls of the function outside attention layers, and in other contexts, are the plain ones."""
    pipe = tiny_pipeline(SD)
    q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected, inside = F.scaled_dot_product_attention(q, q, q), []
    handle = pipe.unet.conv_out.register_forward_hook(
        lambda *_: inside.append(F.scaled_dot_product_attention(q, q, q))
    )
    run(pipe, SD, nag(), da.PLADIS())
    handle.remove()
    assert all(torch.equal(expected, value) for value in inside)
    assert swap._HANDLERS.get() == {}


@pytest.mark.parametrize("name", [SD, SD3, FLUX, WAN, QWEN])
@pytest.mark.few(2)
def test_no_synchronisation_per_step(monkeypatch, name):
    """Nothing that a technique does in a step reads from the device or sends an index to it."""

    def count(steps):
        reads, tensor = [], torch.tensor
        with monkeypatch.context() as patch:
            for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                inner = getattr(torch.Tensor, method)
                patch.setattr(
                    torch.Tensor,
                    method,
                    lambda self, *a, _inner=inner, **k: (reads.append(1), _inner(self, *a, **k))[1],
                )
            patch.setattr(torch, "tensor", lambda *a, **k: (reads.append(1), tensor(*a, **k))[1])
            run(pipe, name, num_inference_steps=steps)
        return len(reads)

    pipe = tiny_pipeline(name)
    grown = {}
    for steps in (2, 6):
        native = count(steps)
        with da.apply(pipe, nag(), da.PLADIS(branches="cond")):
            grown[steps] = count(steps) - native
    assert grown[2] == grown[6]
