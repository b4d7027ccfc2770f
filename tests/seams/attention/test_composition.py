"""NAG and PLADIS together, with guidance, and with whatever else a pipeline carries: LoRA,
IP-Adapter, ControlNet, caches, compilers."""

import functools
import threading
from dataclasses import dataclass

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diffalign as da
from diffalign.core import AttentionTechnique
from diffalign.core.registry import make
from diffalign.core.registry import techniques as registered
from diffalign.families import FAMILIES
from diffalign.guidance import IntervalCFG
from diffalign.guidance.linear_ag import identity_of
from diffalign.guidance.linear_policy import LinearPolicy
from diffalign.seams import swap
from diffalign.seams.denoiser.tap import Generation
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


def nag(scale=4.0, **options):
    return da.NAG(scale, **{"tau": 1.6, "alpha": 0.7, "sigma": (0.0, float("inf")), **options})


def model_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def run(pipe, name, *techniques, **given):
    inputs = {**tiny_inputs(name, batch=2, steps=2), **given}
    if not techniques:
        return final(pipe, inputs), None
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session.report


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", EVERY)
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
def test_every_guidance(name, tmp_path):
    """Each guidance with NAG and PLADIS: all layers act, the rows are the guidance's own, and NAG
    makes a difference."""
    model = SD3 if name == "cfg-zero-star" else SD
    pipe = tiny_pipeline(model)
    if name in registered():
        technique = make(
            name,
            policy(pipe, tmp_path) if name == "linear-ag" else OPTIONS.get(name, {"scale": 3.0}),
        )
    else:
        technique = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
    plain, alone = run(pipe, model, technique, num_inference_steps=4)
    before = footprint(pipe)
    got, report = run(pipe, model, technique, nag(), da.PLADIS(), num_inference_steps=4)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, plain)
    assert all(acting == selected > 0 for acting, selected in report().layers.values())
    assert report().layers.keys() == {"NAG", "PLADIS"}
    if name != "adaptive-guidance":  # whose decision depends on the predictions
        assert report().rows == alone().rows
    assert_untouched(pipe, before)
    off, report = run(pipe, model, technique, nag(1.0), da.PLADIS(0.0), num_inference_steps=4)
    assert torch.equal(off, plain)
    assert report().rows == alone().rows


@pytest.mark.parametrize("guidance", [da.CFG(3.0), da.CFG(1.0)], ids=["CFG", "off"])
@pytest.mark.parametrize("name", [SD, FLUX, "ZImagePipeline"])
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


def lora(pipe):
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_of(pipe).add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        )


@pytest.mark.parametrize("name", [SD, FLUX, WAN])
def test_lora_live_and_fused_agree(name):
    """The adapter's own arithmetic is the processor's business: fused weights give the same image
    up to rounding."""
    pipe = tiny_pipeline(name, dtype=torch.float64)

    def call():
        return {
            key: value.double() if isinstance(value, torch.Tensor) else value
            for key, value in tiny_inputs(name, batch=2, steps=2).items()
        }

    with da.apply(pipe, nag(), da.PLADIS()):
        without = final(pipe, call())
    lora(pipe)
    with da.apply(pipe, nag(), da.PLADIS()):
        live = final(pipe, call())
    model_of(pipe).fuse_lora()
    with da.apply(pipe, nag(), da.PLADIS()):
        fused = final(pipe, call())
    assert (live - without).abs().max() > 1e-3
    assert (
        live - fused
    ).abs().max() <= 64 * EPS * live.abs().max()  # float32 parts of the schedulers and of Wan


@pytest.mark.parametrize("name", [SD, XL, SD3, FLUX, "ChromaPipeline", WAN, QWEN])
def test_fused_projections_agree(name):
    pipe = tiny_pipeline(name, dtype=torch.float64)
    if name == SD3:  # the fused processor of diffusers leaves these out, with and without us
        for block in pipe.transformer.transformer_blocks:
            block.attn.norm_q = block.attn.norm_k = block.attn.norm_added_q = (
                block.attn.norm_added_k
            ) = None

    def call():
        return tiny_inputs(name, batch=2, steps=2, dtype=torch.float64)

    with da.apply(pipe, nag(), da.PLADIS()):
        apart = final(pipe, call())
    model_of(pipe).fuse_qkv_projections()
    with da.apply(pipe, nag(), da.PLADIS()) as session:
        fused = final(pipe, call())
    acting, selected = session.report().layers["NAG"]
    assert acting == selected > 0
    assert (apart - fused).abs().max() <= 64 * EPS * apart.abs().max()  # float32 schedulers


def ip_adapter(pipe):
    """An IP-Adapter with as many image tokens as the text has: only their order tells the two calls
    apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        processors = {}
        for name, processor in pipe.unet.attn_processors.items():
            layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
            new = IPAdapterAttnProcessor2_0(
                hidden_size=layer.to_q.in_features, cross_attention_dim=32, num_tokens=(7,)
            )
            processors[name] = new if "attn2" in name else processor
        pipe.unet.set_attn_processor(processors)
        projection = ImageProjection(
            image_embed_dim=16, cross_attention_dim=32, num_image_text_embeds=7
        )
        pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


SEEN = []


@dataclass(frozen=True, slots=True)
class Recorded(AttentionTechnique):
    """Keeps the keys that it is shown."""

    def __call__(self, attend, q, k, v, site):
        SEEN.append(k.clone())
        return attend(q, k, v)


def test_ip_adapter_keeps_its_image_keys():
    """With its scale at 0 the result is that of no adapter; with scale 1 the techniques still act
    on the text call alone."""
    plain = tiny_pipeline(SD)
    without, _ = run(plain, SD, nag(), da.PLADIS())
    pipe = tiny_pipeline(SD)
    ip_adapter(pipe)
    picture = {
        "ip_adapter_image_embeds": [
            torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(1))
        ]
    }
    alone, _ = run(pipe, SD, **picture)
    got, report = run(pipe, SD, nag(), da.PLADIS(), **picture)
    assert report().layers == {"NAG": (4, 4), "PLADIS": (4, 4)}
    assert not torch.equal(got, alone)
    SEEN.clear()
    keys = []
    layers = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    handles = [layer.to_k.register_forward_hook(lambda m, a, o: keys.append(o)) for layer in layers]
    run(pipe, SD, Recorded(), **picture)
    for handle in handles:
        handle.remove()
    assert (
        len(SEEN) == len(keys) == 2 * 4
    )  # one call of each layer in each step, the one with the text keys
    assert all(torch.equal(seen.transpose(1, 2).flatten(2), key) for seen, key in zip(SEEN, keys))
    for processor in pipe.unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [0.0]
    off, _ = run(pipe, SD, nag(), da.PLADIS(), **picture)
    assert (off - without).abs().max() <= 64 * EPS * without.abs().max()
    assert (off - got).abs().max() > 1e-3


@pytest.mark.parametrize("share_image", [True, False])
def test_ip_adapter_of_flux(share_image):
    """Its image keys are a second call in each double block, with the image's queries alone; they
    go on as without us."""

    def made(scale):
        pipe = tiny_pipeline(FLUX)
        size = (
            pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            processors = {
                key: old
                if "single" in key
                else FluxIPAdapterAttnProcessor(size, size, num_tokens=(7,), scale=scale)
                for key, old in pipe.transformer.attn_processors.items()
            }
            pipe.transformer.set_attn_processor(processors)
            projection = ImageProjection(
                image_embed_dim=16, cross_attention_dim=size, num_image_text_embeds=7
            )
            pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        return pipe

    def picture(seed):
        return [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed))]

    given = {"ip_adapter_image_embeds": picture(1), "negative_ip_adapter_image_embeds": picture(2)}
    techniques = nag(share_image=share_image), da.PLADIS()
    without, _ = run(tiny_pipeline(FLUX), FLUX, *techniques)
    assert torch.equal(run(made(0.0), FLUX, *techniques, **given)[0], without)
    got, report = run(made(1.0), FLUX, *techniques, **given)
    assert report().layers == {"NAG": (2, 2), "PLADIS": (2, 2)}
    assert not torch.equal(got, without)
    assert not torch.equal(got, run(made(1.0), FLUX, **given)[0])


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionAdapterPipeline",
        "FluxControlNetPipeline",
        "FluxKontextPipeline",
        "QwenImageControlNetPipeline",
        "SanaControlNetPipeline",
        "LTXImageToVideoPipeline",
        "StableDiffusionInpaintPipeline",
    ],
)
def test_controls_and_image_conditions(name):
    pipe = tiny_pipeline(name)
    native, _ = run(pipe, name)
    got, report = run(pipe, name, nag(), da.PLADIS())
    for acting, selected in report().layers.values():
        assert acting == selected > 0
    assert not torch.equal(got, native)
    assert torch.equal(run(pipe, name)[0], native)
    off, _ = run(pipe, name, nag(1.0), da.PLADIS(0.0))
    assert torch.equal(off, native)


def test_z_image_controlnet_is_refused_by_name():
    name = "ZImageControlNetPipeline"
    pipe = tiny_pipeline(name)
    with pytest.raises(
        da.UnsupportedModel, match="ControlNet's residuals have the length of one text"
    ):
        run(pipe, name, nag())
    assert not next(row for row in da.supports(pipe) if row.name == "nag").works
    with pytest.raises(da.UnsupportedModel, match="one text"):
        da.preset("negative", pipe)
    _, report = run(pipe, name, da.PLADIS())
    assert report().layers["PLADIS"] == (2, 2)


@pytest.mark.parametrize("processor", [AttnProcessor, XFormersAttnProcessor, "sliced"])
def test_processors_without_the_call_give_way(processor):
    pipe = tiny_pipeline(SD)
    expected, _ = run(pipe, SD, nag(), da.PLADIS())
    if processor == "sliced":
        pipe.enable_attention_slicing(1)
        name = "SlicedAttnProcessor"
    else:
        mine = processor()
        pipe.unet.set_attn_processor(
            {key: mine if "attn2" in key else old for key, old in pipe.unet.attn_processors.items()}
        )
        name = processor.__name__
    before = dict(pipe.unet.attn_processors)
    got, report = run(pipe, SD, nag(), da.PLADIS())
    assert (
        f"{name} gives way to native attention at 4 layers while the techniques act"
        in report().notes
    )
    assert (
        got - expected
    ).abs().max() <= 64 * EPS * expected.abs().max()  # sliced self-attention rounds otherwise
    assert all(pipe.unet.attn_processors[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", [FLUX, WAN, QWEN])
def test_other_backends_give_way(name):
    pipe = tiny_pipeline(name, dtype=torch.float64)
    double = {
        key: value
        for key, value in tiny_inputs(name, batch=2, dtype=torch.float64).items()
        if "embeds" in key
    }
    expected, _ = run(pipe, name, nag(), da.PLADIS(), **double)
    pipe.transformer.set_attention_backend("_native_math")
    held = {
        key: processor._attention_backend
        for key, processor in pipe.transformer.attn_processors.items()
    }
    got, report = run(pipe, name, nag(), da.PLADIS(), **double)
    assert any("attention backend '_native_math' gives way" in note for note in report().notes)
    assert (
        got - expected
    ).abs().max() <= 64 * EPS * expected.abs().max()  # self-attention keeps the other backend
    assert held == {
        key: processor._attention_backend
        for key, processor in pipe.transformer.attn_processors.items()
    }


def test_a_processor_that_hides_its_attention_is_an_error():
    class Hidden:
        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
        ):
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            weights = (attn.to_q(hidden_states) @ attn.to_k(text).transpose(1, 2)).softmax(-1)
            return attn.to_out[0](weights @ attn.to_v(text))

    pipe = tiny_pipeline(SD)
    pipe.unet.set_attn_processor(Hidden())
    native, _ = run(pipe, SD)
    with pytest.raises(da.UnsupportedModel, match=r"Hidden at .*attn2.* made 0 calls"):
        run(pipe, SD, nag())
    assert torch.equal(run(pipe, SD)[0], native)


def test_context_parallel_is_refused():
    pipe = tiny_pipeline(FLUX)
    pipe.transformer.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(da.UnsupportedModel, match="context parallel"):
        run(pipe, FLUX, da.PLADIS())


def test_text_layers_that_the_table_does_not_know_are_refused():
    """A cross-attention layer that nobody intercepts would mix the two texts."""
    pipe = tiny_pipeline(SD)
    pipe.unet.mid_block.extra = Attention(query_dim=32, cross_attention_dim=32)
    with pytest.raises(da.UnsupportedModel, match=r"mid_block.extra .* attends to the text"):
        run(pipe, SD, nag())


def test_hooks_of_offloading_stay_inside():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = tiny_pipeline(FLUX)
    expected, _ = run(pipe, FLUX, nag(), da.PLADIS())
    for module in pipe.transformer.modules():
        add_hook_to_module(module, ModelHook())
    got, report = run(pipe, FLUX, nag(), da.PLADIS())
    assert torch.equal(got, expected)
    assert report().layers == {"NAG": (2, 2), "PLADIS": (2, 2)}


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "model", "sequential"])
@pytest.mark.parametrize("name", [SD, FLUX, WAN, "ZImagePipeline"])
def test_offloading(name, kind):
    """Groups of layers, whole models or single layers that come to the device when they are called;
    here the device is the CPU itself."""
    expected, _ = run(tiny_pipeline(name), name, nag(), da.PLADIS())
    pipe = tiny_pipeline(name)
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif (
        kind == "sequential"
        # what enable_sequential_cpu_offload does to each model; the method itself wants an
        # accelerator
    ):
        for model in (
            part for part in pipe.components.values() if isinstance(part, torch.nn.Module)
        ):
            cpu_offload(model, torch.device("cpu"), offload_buffers=bool(model._parameters))
        assert all(weight.is_meta for weight in model_of(pipe).parameters())
    else:
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(
            model_of(pipe), onload_device=torch.device("cpu"), offload_type=kind, **groups
        )
    got, report = run(pipe, name, nag(), da.PLADIS())
    assert torch.equal(got, expected)
    assert all(acting == selected > 0 for acting, selected in report().layers.values())


def text_gradient(name, prepare=lambda pipe: None):
    """Gradient of a loss in the prompt's embeddings; the backward pass runs in another thread,
    after the session."""
    pipe = tiny_pipeline(name)
    model_of(pipe).requires_grad_(False)
    prepare(pipe)
    inputs = tiny_inputs(name, steps=2)
    text = inputs["prompt_embeds"]
    for item in text if isinstance(text, list) else [text]:
        item.requires_grad_()
    base = type(pipe)
    pipe.__class__ = type(
        base.__name__, (base,), {"__call__": base.__call__.__wrapped__}
    )  # without its no_grad
    with da.apply(pipe, nag(), da.PLADIS()) as session, torch.enable_grad():
        result = pipe(**inputs)[0]
    held = [
        m._gradient_checkpointing_func
        for m in model_of(pipe).modules()
        if "_gradient_checkpointing_func" in vars(m)
    ]
    assert not any(isinstance(func, functools.partial) for func in held)
    worker = threading.Thread(target=result.square().mean().backward)
    worker.start()
    worker.join()
    return (text[0] if isinstance(text, list) else text).grad, session.report().rows


@pytest.mark.parametrize("name", [SD, SD3, FLUX, WAN, QWEN, "Lumina2Pipeline", "ZImagePipeline"])
def test_recomputed_under_the_techniques(monkeypatch, name):
    """Blocks by the model's gradient checkpointing, or whole denoiser calls: the gradient is that
    without, bit for bit."""

    def enable(pipe):
        model_of(pipe).enable_gradient_checkpointing()
        model_of(pipe).train()

    (kept, rows), (recomputed, _) = text_gradient(name), text_gradient(name, enable)
    assert kept.abs().max() > 0
    assert torch.equal(kept, recomputed)
    made = Generation.__init__

    def with_checkpoint(self, *args, **kwargs):
        def around(inner):
            return lambda evaluation, given: checkpoint(
                inner, evaluation, given, use_reentrant=False
            )

        made(self, *args, **kwargs)
        self.evaluator.middleware.append(around)

    monkeypatch.setattr(Generation, "__init__", with_checkpoint)
    whole, counted = text_gradient(name)
    assert torch.equal(kept, whole)
    assert counted == rows


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [(SD, False), (FLUX, False), (SD, True)])
def test_compiled_models_compile_once(name, whole):
    """Bit-identical to eager; the second session and runs between sessions compile nothing new."""
    import torch._dynamo

    graphs = []

    def backend(module, example):
        graphs.append(1)
        return module.forward

    pipe = tiny_pipeline(name)
    native, _ = run(pipe, name)
    expected, _ = run(pipe, name, nag(), da.PLADIS())
    torch._dynamo.reset()
    (model_of(pipe).compile if whole else model_of(pipe).compile_repeated_blocks)(backend=backend)
    counts = []
    for _ in range(3):
        graphs.clear()
        got, report = run(pipe, name, nag(), da.PLADIS())
        assert torch.equal(got, expected)
        assert torch.equal(run(pipe, name)[0], native)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
    assert report().layers["NAG"][0] == report().layers["NAG"][1] > 0


def pab():
    skip = {"cross_attention_block_skip_range": 2, "spatial_attention_block_skip_range": 2}
    window = {
        "cross_attention_timestep_skip_range": (-1, 10001),
        "spatial_attention_timestep_skip_range": (-1, 10001),
    }
    return PyramidAttentionBroadcastConfig(**skip, **window, current_timestep_callback=lambda: 500)


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "taylor seer": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "mag": lambda: MagCacheConfig(mag_ratios=[1.0] * 6, num_inference_steps=6),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [WAN, "LTXPipeline", "CogVideoXPipeline", FLUX, QWEN])
@pytest.mark.parametrize("window", [{}, {"sigma": None, "start": 0.0, "stop": 0.5}])
def test_caches_live_on_and_are_emptied_where_the_text_changes(name, window, cache):
    pipe = tiny_pipeline(name)
    pipe.transformer.enable_cache(CACHES[cache]())
    inputs = {"num_inference_steps": 6}
    cached, _ = run(pipe, name, **inputs)
    got, report = run(pipe, name, nag(**window), da.PLADIS(), **inputs)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, cached)
    assert torch.equal(run(pipe, name, **inputs)[0], cached)
    assert report().layers["NAG"][0] == report().layers["NAG"][1]


def test_caches_that_mix_texts_are_refused():
    for name, config in (
        (WAN, FasterCacheConfig(current_timestep_callback=lambda: 500)),
        (FLUX, TextKVCacheConfig()),
    ):
        pipe = tiny_pipeline(name)
        pipe.transformer.enable_cache(config)
        with pytest.raises(da.UnsupportedModel, match=type(config).__name__):
            run(pipe, name, da.PLADIS())
    pipe = tiny_pipeline(FLUX)
    pipe.transformer.enable_cache(pab())
    with pytest.raises(da.UnsupportedModel, match="one branch to the other"):
        run(pipe, FLUX, nag())
    pipe = tiny_pipeline("LTXPipeline")
    pipe.transformer.enable_cache(pab())
    _, report = run(pipe, "LTXPipeline", nag(), num_inference_steps=4)
    assert report().layers["NAG"] == (2, 2)


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
