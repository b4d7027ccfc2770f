"""Processors and backends that give way, layers that are refused, weights that come and go."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    XFormersAttnProcessor,
)

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, FLUX, WAN, QWEN = (
    "StableDiffusionPipeline",
    "FluxPipeline",
    "WanPipeline",
    "QwenImagePipeline",
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
