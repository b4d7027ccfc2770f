"""Perturbed-attention guidance: diffusers' own PAG pipelines, a slow attention with a mask, and
every other technique beside it."""

import copy
import dataclasses
import inspect
import math

import diffusers
import pytest
import torch

import diffalign as da
from diffalign.attention import PLADIS
from diffalign.core import Site, UnsupportedModel
from diffalign.families import FAMILIES
from diffalign.guidance import CFG, PAG
from diffalign.guidance.pag import IdentityMaps
from diffalign.seams.attention.dense import Dense, Usage
from diffalign.seams.attention.intercept import start
from diffalign.seams.attention.seats import SDPA, Arguments, TorchForm
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.deep import deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings(
    "ignore:The call asks", "ignore:The negative prompt has no effect"
)


class TestPAG(GuidanceContract):
    def make(self):
        return PAG(3.0, pag_scale=1.5, layers=("mid_block.*",), start=0.0, stop=0.5)

    def off(self):
        return PAG(3.0, pag_scale=0.0), CFG(3.0)

    def rows(self, steps, batch):
        return batch * (2 * steps + steps // 2)


def call(pipe, *techniques, scale=4.0, steps=2, batch=2, **more):
    name = type(pipe).__name__
    inputs = tiny_inputs(name, steps=steps, batch=batch, dtype=more.pop("dtype", torch.float32))
    gate = dict.fromkeys(FAMILIES[name].gates[:1], scale)
    with da.apply(pipe, *techniques) as session:
        return final(pipe, {**inputs, **gate, **more}), session.report()


# diffusers' pipeline -> the plain class, its layers by their way of naming, and by ours
THEIRS = {
    "StableDiffusionPAGPipeline": (SD, "mid", None),
    "StableDiffusionXLPAGPipeline": ("StableDiffusionXLPipeline", "mid", None),
    "KolorsPAGPipeline": ("KolorsPipeline", "mid", None),
    "StableDiffusion3PAGPipeline": (SD3, "blocks.1", None),
    "PixArtSigmaPAGPipeline": ("PixArtSigmaPipeline", "blocks.1", None),
    "HunyuanDiTPAGPipeline": ("HunyuanDiTPipeline", "blocks.1", ("blocks.1.*",)),
}
QUICK = {"StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"}


# without guidance, theirs for Hunyuan-DiT fails on tensors of two sizes
CASES = [
    pytest.param(name, scale, marks=() if name in QUICK else pytest.mark.slow)
    for name in THEIRS
    for scale in (4.0, 1.0)
    if (name, scale) != ("HunyuanDiTPAGPipeline", 1.0)
]


@pytest.mark.parametrize(("theirs", "scale"), CASES)
def test_pag_is_diffusers_own(theirs, scale):
    name, layers, patterns = THEIRS[theirs]
    pipe = tiny_pipeline(name)
    if name == SD3:  # their processor leaves out the norms of queries and keys, which SD3.5 has
        for block in pipe.transformer.transformer_blocks:
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                setattr(block.attn, norm, None)
    ours, report = call(pipe, PAG(pag_scale=2.0, layers=patterns), scale=scale)
    assert report.rows == 2 * 2 * (3 if scale != 1.0 else 2)
    cls = getattr(diffusers, theirs)
    known = inspect.signature(cls.__init__).parameters
    parts = {k: part for k, part in copy.deepcopy(pipe.components).items() if k in known}
    native = cls(**parts, pag_applied_layers=[layers])
    inputs = tiny_inputs(name, steps=2, batch=2)
    expected = final(native, {**inputs, "guidance_scale": scale, "pag_scale": 2.0})
    # three passes in one batch or in two round otherwise, by eps; the scales multiply that
    bound = 64 * (4.0 + 2.0) * EPS * expected.abs().max()
    assert (ours - expected).abs().max() <= bound
    plain, _ = call(pipe, CFG(), scale=scale)
    assert (ours - plain).abs().max() > 100 * bound


def through(q, k, v, mask, site, techniques):
    """One call of torch's attention at ``site``, sent through ``techniques``."""
    call = Arguments(q, k, v, mask, {})
    dense = Dense("native", SDPA, TorchForm(), call, site.layer, Usage())
    return start(call, dense, site, techniques, lambda op, key, make: make().call)


def slow(q, k, v, image, bias):
    """Attention in float64 with a full mask: image queries see themselves and the text."""
    size = q.shape[2]
    place = torch.arange(size)
    inside = (place >= image.start) & (place < image.stop)
    hidden = inside[:, None] & inside[None] & ~torch.eye(size, dtype=torch.bool)
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    scores = (scores if bias is None else scores + bias).masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", ["none", "keys", "bool keys", "full"])
@pytest.mark.parametrize("image", [slice(0, 12), slice(5, 17), slice(2, 14)], ids=str)
def test_joint_attention_is_the_slow_one(image, mask, dtype, monkeypatch):
    monkeypatch.setattr("diffalign.guidance.pag.SCORES", 2 * 2 * 5 * 5)  # in pieces
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 17, 8, generator=rng).to(dtype) for _ in range(3))
    shape = {"none": None, "full": (2, 1, 17, 17)}.get(mask, (2, 1, 1, 17))
    given = bias = None
    if shape is not None:
        given = bias = torch.randn(shape, generator=rng).to(dtype)
    if mask == "bool keys":
        given = torch.ones(shape, dtype=torch.bool)
        given[1, ..., [image.start - 1 if image.start else 16]] = False
        bias = torch.zeros(shape).masked_fill(~given, -math.inf)
    site = Site("x", "joint", {"image": image}, conditioned=(True, True))
    change = IdentityMaps(names=frozenset("x"))
    out = through(q, k, v, given, site, [change])
    expected = slow(q, k, v, image, None if bias is None else bias.double())
    assert out.dtype == dtype
    # the text queries are torch's own attention
    worst = (out - expected).abs().max() / expected.abs().max()
    assert worst <= 16 * torch.finfo(dtype).eps
    per_row = dataclasses.replace(site, parts={}, row_parts=({"image": image},) * 2)
    again = through(q, k, v, given, per_row, [change])
    assert (again - out).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_pladis_sharpens_the_perturbed_map():
    """PLADIS re-weighs the text of an image query within the mass that the perturbed map gives."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 8, generator=rng) for _ in range(3))
    text, image = slice(0, 4), slice(4, 11)
    site = Site("x", "joint", {"image": image, "prompt": text}, conditioned=(True,))
    chain = [PLADIS(1.0, alpha=2.0), IdentityMaps(names=frozenset("x"))]
    out = through(q, k, v, None, site, chain)
    dense = slow(q, k, v, image, None)
    mass = slow(q, k, torch.zeros_like(v).index_fill(2, torch.arange(4), 1.0), image, None)
    own = dense - slow(q, k, v.index_fill(2, torch.arange(4, 11), 0.0), image, None)
    scores = (q @ k.mT / math.sqrt(8))[:, :, image, text].double()
    # sparsemax by its threshold
    top = scores.sort(-1, descending=True).values
    sums = (top.cumsum(-1) - 1) / torch.arange(1, 5)
    size = (top > sums).sum(-1, keepdim=True)
    sparse = (scores - sums.gather(-1, size - 1)).clamp_min(0)
    expected = own[:, :, image] + mass[:, :, image] * (sparse @ v[:, :, text].double())
    assert (out[:, :, image] - expected).abs().max() <= 1e-5
    assert (out[:, :, text] - dense[:, :, text]).abs().max() <= 1e-5


class Masked:
    """A processor of a user for SD3: image queries see themselves and the text."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
        count = hidden_states.shape[1]
        attention = torch.nn.functional.scaled_dot_product_attention

        def masked(q, k, v, **options):
            options.pop("attn_mask", None)
            size = q.shape[2]
            mask = torch.zeros(1, 1, size, size, dtype=q.dtype)
            mask[..., :count, :count] = -math.inf
            mask[..., :count, :count].diagonal(dim1=2, dim2=3).zero_()
            return attention(q, k, v, attn_mask=mask, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
            return self.inner(attn, hidden_states, encoder_hidden_states, **rest)


def test_nag_acts_in_the_perturbed_pass_too():
    pipe = deep_pipeline(SD3)
    twin = copy.deepcopy(pipe)
    attention = twin.transformer.transformer_blocks[1].attn
    attention.processor = Masked(attention.processor)
    nag = da.NAG(3.0, tau=2.5, alpha=0.5, sigma=(0.0, math.inf))
    layers = ("transformer_blocks.1.attn",)
    on, report = call(pipe, PAG(4.0, pag_scale=2.0, layers=layers), nag, steps=1)
    cfg, base = call(pipe, CFG(4.0), nag, steps=1)
    cond, _ = call(pipe, CFG(1.0), nag, steps=1)
    worse, _ = call(twin, CFG(1.0), nag, steps=1)
    expected = cfg.double() + 2.0 * (cond.double() - worse.double())
    bound = 64 * 6.0 * EPS * max(x.abs().max() for x in (cfg, cond, worse))
    assert (on - expected).abs().max() <= bound
    assert (expected - cfg).abs().max() > 20 * bound
    assert report.rows == base.rows + 2
    assert report.layers["NAG"] == base.layers["NAG"]
    assert report.layers["IdentityMaps"] == (1, 1)
    assert report.acted["IdentityMaps"] == 1


@pytest.mark.parametrize("name", [SD, FLUX, "Lumina2Pipeline", "HunyuanVideoPipeline"])
@pytest.mark.few(2)
def test_with_nag_and_pladis_and_the_pipeline_as_before(name):
    pipe = deep_pipeline(name)
    before, _ = call(pipe, CFG(4.0))
    nag = da.NAG(3.0, tau=2.5, alpha=0.5, sigma=(0.0, math.inf))
    on, report = call(pipe, PAG(4.0), nag, da.PLADIS(1.5))
    base, _ = call(pipe, CFG(4.0), nag, da.PLADIS(1.5))
    assert on.isfinite().all()
    assert not torch.equal(on, base)
    assert report.acted["IdentityMaps"] == 2
    assert torch.equal(call(pipe, CFG(4.0))[0], before)


def test_sliced_attention_gives_way():
    pipe = tiny_pipeline(SD)
    expected, _ = call(pipe, PAG(4.0))
    pipe.enable_attention_slicing(1)
    processors = dict(pipe.unet.attn_processors)
    out, report = call(pipe, PAG(4.0))
    assert (out - expected).abs().max() <= 64 * 7 * EPS * expected.abs().max()
    assert any("gives way to native attention" in note for note in report.notes)
    assert dict(pipe.unet.attn_processors) == processors


def test_an_exception_in_the_perturbed_pass_restores_everything():
    pipe = tiny_pipeline(SD)
    native, _ = call(pipe, CFG())
    kinds = [type(module) for module in pipe.unet.modules()]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    hook = pipe.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        call(pipe, PAG())
    hook.remove()
    assert [type(module) for module in pipe.unet.modules()] == kinds
    assert torch.equal(call(pipe, CFG())[0], native)


def test_bfloat16_and_rows():
    """An image of a batch is the image alone, up to rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        pipe = tiny_pipeline(SD3, dtype=dtype)
        both, _ = call(pipe, PAG(pag_scale=2.0), dtype=dtype)
        inputs = tiny_inputs(SD3, steps=2, batch=2, dtype=dtype)
        one = {
            key: value[:1] if isinstance(value, torch.Tensor | list) else value
            for key, value in inputs.items()
        }
        with da.apply(pipe, PAG(pag_scale=2.0)):
            alone = final(pipe, {**one, "guidance_scale": 4.0})
        assert both.dtype == dtype
        bound = 64 * 6 * torch.finfo(dtype).eps * both.abs().max()
        assert (both[:1] - alone).abs().max() <= bound


@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxControlPipeline"])
def test_distilled_models_can_have_it(name):
    pipe = tiny_pipeline(name)
    native = final(pipe, tiny_inputs(name, steps=2, batch=2))
    on, report = call(pipe, PAG())
    assert report.rows == 2 * 2 * 2
    assert not torch.equal(on, native)
    assert torch.equal(call(pipe, PAG(pag_scale=0.0))[0], native)
    with pytest.raises(UnsupportedModel, match="guidance is distilled"):
        call(pipe, PAG(3.0))
    assert {row.name: row.works for row in da.supports(pipe)}["pag"]
    assert not {row.name: row.works for row in da.supports(pipe)}["cfg"]


def test_a_distilled_unet_keeps_its_scale():
    """Its call's guidance scale is an input of the model: PAG that is off leaves it alone."""
    pipe = tiny_pipeline(SD)
    config = {**pipe.unet.config, "time_cond_proj_dim": 8, "_use_default_values": []}
    unet = type(pipe.unet).from_config(config)
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    pipe.unet = unet.eval()
    inputs = {**tiny_inputs(SD, steps=2, batch=2), "guidance_scale": 4.0}
    native = final(pipe, inputs)
    assert torch.equal(call(pipe, PAG(pag_scale=0.0))[0], native)
    on, report = call(pipe, PAG())
    assert report.rows == 2 * 2 * 2
    assert not torch.equal(on, native)


def test_refusals_say_what_to_do():
    with pytest.raises(UnsupportedModel, match=r"PAG cannot act on SanaPipeline: .* is linear"):
        call(tiny_pipeline("SanaPipeline"), PAG())
    rows = {row.name: row for row in da.supports(tiny_pipeline("SanaPipeline"))}
    assert "is linear" in rows["pag"].reason
    with pytest.raises(UnsupportedModel, match="knows no such layer in auraflow"):
        call(tiny_pipeline("AuraFlowPipeline"), PAG())
    with pytest.raises(
        UnsupportedModel, match=r"no layer of sd fits mid\.\*\. Nearest: .*mid_block"
    ):
        call(tiny_pipeline(SD), PAG(layers=("mid.*",)))
    native = diffusers.StableDiffusionPAGPipeline(**tiny_pipeline(SD).components)
    with pytest.raises(UnsupportedModel, match=r"enable_pag=False.* with da.PAG"):
        da.apply(native, PAG())
    with pytest.raises(UnsupportedModel, match="none of 4 steps lies in the window"):
        call(tiny_pipeline(SD), PAG(start=0.3, stop=0.4), steps=4)


def test_feature_caches():
    """The first block's cache keeps the perturbed pass apart; the broadcast of attention outputs is
    refused."""
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    name = "WanPipeline"
    pipe = deep_pipeline(name)
    truth, _ = call(pipe, PAG(), batch=1, steps=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(call(pipe, PAG(), batch=1, steps=4)[0], truth)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: pipe._current_timestep,
        )
    )
    with pytest.raises(UnsupportedModel, match="hands attention outputs of one pass to the next"):
        call(pipe, PAG(), batch=1)
    pipe.transformer.disable_cache()


@pytest.mark.slow
def test_compiled():
    from torch._dynamo.testing import CompileCounter

    name = SD3
    pipe, counter = tiny_pipeline(name), CompileCounter()
    eager, _ = call(pipe, PAG(), steps=4)
    torch._dynamo.reset()
    getattr(pipe, FAMILIES[name].denoisers[0]).compile(backend=counter)
    once, report = call(pipe, PAG(), steps=4)
    count = counter.frame_count
    assert (once - eager).abs().max() <= 64 * 7 * EPS * eager.abs().max()
    assert report.rows == 2 * 12
    call(pipe, PAG(pag_scale=1.0), steps=4)
    assert counter.frame_count == count


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    pipe = tiny_pipeline(SD3)
    inputs = tiny_inputs(SD3, steps=1)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))

    def loss(x):
        with da.apply(pipe, PAG(4.0)):
            arguments = {**inputs, "latents": x, "guidance_scale": 4.0}
            return pipe.__call__.__wrapped__(pipe, **arguments).images.square().mean()

    x = noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    move = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) * 1e-2
    change = (loss(noise + move) - loss(noise - move)) / 2
    assert (change - (gradient * move).sum()).abs() <= 2e-2 * change.abs()
