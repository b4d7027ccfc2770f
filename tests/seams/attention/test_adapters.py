"""NAG and PLADIS with what a pipeline carries: LoRA, IP-Adapters, ControlNets."""

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import diffalign as da
from diffalign.core import AttentionTechnique
from diffalign.testing.calls import model_of, nag, run
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

pytestmark = pytest.mark.slow

SD, XL, SD3, FLUX, WAN, QWEN = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "QwenImagePipeline",
)
EPS = torch.finfo(torch.float32).eps


def lora(pipe):
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_of(pipe).add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        )


@pytest.mark.parametrize("name", [SD, FLUX, WAN])
@pytest.mark.few(1)
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
@pytest.mark.few(3)
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
@pytest.mark.few(1)
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
@pytest.mark.few(3)
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
