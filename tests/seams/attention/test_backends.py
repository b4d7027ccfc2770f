"""Backends of the user's that are kept, processors and backends that give way, layers that are
refused, weights that come and go."""

import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models import attention_dispatch as dispatch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch.nn import functional as F

import diffalign as da
from diffalign.core import AttentionTechnique
from diffalign.families import FAMILIES
from diffalign.seams.attention.sites import layers_of
from diffalign.testing.calls import model_of, nag, run
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, FLUX, WAN, QWEN = (
    "StableDiffusionPipeline",
    "FluxPipeline",
    "WanPipeline",
    "QwenImagePipeline",
)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def active_backend(monkeypatch):
    """Setting a model's backend leaves the process-wide one changed."""
    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)


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


class Backend:
    """A backend for a test: native attention times ``factor``, under a name of the registry."""

    def __init__(self, factor=1.0, refuses=lambda query, value, mask: None):
        self.factor, self.refuses = factor, refuses
        # (shape of the queries, shape of the keys, mask) of each call
        self.calls = []

    def __call__(self, query, key, value, attn_mask, scale):
        self.calls.append((query.shape, key.shape, attn_mask))
        self.refuses(query, value, attn_mask)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
        return out.transpose(1, 2) * self.factor


@pytest.fixture
def register(monkeypatch):
    """Puts a backend in the place of one that cannot run here."""

    def put(name, **options):
        backend, key = Backend(**options), AttentionBackendName(name)

        def function(query, key, value, attn_mask=None, scale=None):
            return backend(query, key, value, attn_mask, scale)

        names = {"query", "key", "value", "attn_mask", "scale"}
        monkeypatch.setitem(Registry._backends, key, function)
        monkeypatch.setitem(Registry._supported_arg_names, key, names)
        monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda backend: None)
        monkeypatch.setattr(dispatch, "_maybe_download_kernel_for_backend", lambda backend: None)
        return backend

    return put


def doubles(name):
    """Text inputs in float64, and the pipeline."""
    inputs = tiny_inputs(name, batch=2, dtype=torch.float64)
    texts = {key: value for key, value in inputs.items() if "embeds" in key or "mask" in key}
    return tiny_pipeline(name, dtype=torch.float64), texts


BOUND = 64 * EPS  # the schedulers round to float32


@contextmanager
def scaled_native(factor):
    """Within the block, the dispatcher's native attention is ``factor`` times as large, before any
    technique sees it."""
    key = AttentionBackendName.NATIVE
    native = Registry._backends[key]

    def scaled(query, key, value, attn_mask=None, scale=None):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value * factor))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
        return out.transpose(1, 2)

    Registry._backends[key] = scaled
    names = Registry._supported_arg_names[key]
    Registry._supported_arg_names[key] = {"query", "key", "value", "attn_mask", "scale"}
    try:
        yield
    finally:
        Registry._backends[key], Registry._supported_arg_names[key] = native, names


def layers(pipe):
    """Number of text layers."""
    family = FAMILIES[type(pipe).__name__]
    return len(list(layers_of(family, "transformer", pipe.transformer)))


@pytest.mark.parametrize(
    ("name", "backend", "technique"),
    [
        *((FLUX, name, nag()) for name in ("flash", "sage", "flex", "_flash_3_hub", "xformers")),
        (FLUX, "flash", da.PLADIS()),
        (WAN, "sage", nag()),
        (QWEN, "flash", nag()),
        (QWEN, "flash", da.PLADIS()),
        ("ChromaPipeline", "xformers", nag()),
    ],
)
@pytest.mark.few(4)
def test_the_users_backend_runs_the_dense_calls(register, name, backend, technique):
    """One that scales its result: the same comes out as of native attention with scaled values."""
    pipe, texts = doubles(name)
    with scaled_native(1.25):
        expected, _ = run(pipe, name, technique, **texts)
    chosen = register(backend, factor=1.25)
    function = Registry._backends[AttentionBackendName(backend)]
    pipe.transformer.set_attention_backend(backend)
    got, report = run(pipe, name, technique, **texts)
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    assert chosen.calls
    assert report().backends == {backend: layers(pipe)}
    assert f"attention backend of the techniques' layers: {backend} at" in str(report())
    assert not any("gives way" in note for note in report().notes)
    assert Registry._backends[AttentionBackendName(backend)] is function


@dataclass(frozen=True, slots=True)
class Caught(AttentionTechnique):
    """Every text layer's attention is caught and called as it is."""

    def __call__(self, attend, q, k, v, site):
        return attend(q, k, v)


@pytest.mark.parametrize("way", ["model", "context", "process"])
@pytest.mark.parametrize("name", [FLUX, WAN, QWEN, "ChromaPipeline", "LTXPipeline"])
@pytest.mark.few(6)
def test_identity_is_exact_however_the_backend_was_chosen(register, name, way, monkeypatch):
    """``set_attention_backend``, ``attention_backend`` and what DIFFUSERS_ATTN_BACKEND sets."""
    pipe = tiny_pipeline(name)
    register("flash", factor=1.25)
    with ExitStack() as stack:
        if way == "model":
            pipe.transformer.set_attention_backend("flash")
        elif way == "context":
            stack.enter_context(dispatch.attention_backend("flash"))
        else:
            monkeypatch.setattr(Registry, "_active_backend", AttentionBackendName("flash"))
        plain, _ = run(pipe, name)
        got, report = run(pipe, name, Caught())
        assert torch.equal(got, plain)
        assert report().backends == {"flash": layers(pipe)}


@pytest.mark.parametrize("backend", ["_native_math", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [FLUX, WAN, QWEN])
def test_backends_that_run_here(name, backend):
    """Real ones; without a compiler, flex needs no more than torch."""
    pipe, texts = doubles(name)
    expected, _ = run(pipe, name, nag(), **texts)
    pipe.transformer.set_attention_backend(backend)
    got, report = run(pipe, name, nag(), **texts)
    assert backend in report().backends
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()


def no_mask(query, value, mask):
    if mask is not None:
        raise ValueError("`attn_mask` is not supported for flash-attn 2.")


def no_wide_values(query, value, mask):
    if value.shape[-1] != query.shape[-1]:
        raise RuntimeError("value must have the head size of the query")


def no_double(query, value, mask):
    assert query.dtype in (torch.float16, torch.bfloat16), "dtype must be float16 or bfloat16"


@pytest.mark.parametrize(
    ("name", "technique", "refuses", "reason"),
    [
        (QWEN, nag(), no_mask, "ValueError: `attn_mask` is not supported"),
        (FLUX, da.PLADIS(), no_wide_values, "RuntimeError: value must have the head size"),
        (FLUX, nag(), no_double, "AssertionError: dtype must be float16"),
        ("ChromaPipeline", nag(), no_mask, "ValueError: `attn_mask` is not supported"),
    ],
)
def test_a_backend_that_cannot_serve_gives_way(register, name, technique, refuses, reason):
    """With one note, and after one try for each kind of call."""
    pipe, texts = doubles(name)
    expected, _ = run(pipe, name, technique, **texts)
    chosen = register("flash", refuses=refuses)
    for layer in layers_of(FAMILIES[name], "transformer", pipe.transformer):
        layer.module.processor._attention_backend = AttentionBackendName("flash")
    got, report = run(pipe, name, technique, **texts)
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    (note,) = (note for note in report().notes if "gives way" in note)
    assert note.startswith("attention backend 'flash' gives way to native attention at")
    assert reason in note
    assert report().backends["native"] == layers(pipe)
    assert len(chosen.calls) <= 2 * len({(q[3], m is None) for q, _, m in chosen.calls})


def test_a_backend_that_cuts_wide_values_gives_way(register, monkeypatch):
    """Some pad heads to a known size and cut the result back to that of the query."""
    pipe, texts = doubles(FLUX)
    expected, _ = run(pipe, FLUX, da.PLADIS(), **texts)
    backend = register("sage")
    whole = Backend.__call__
    monkeypatch.setattr(
        Backend,
        "__call__",
        lambda self, q, k, v, m, s: whole(self, q, k, v, m, s)[..., : q.shape[-1]],
    )
    pipe.transformer.set_attention_backend("sage")
    got, report = run(pipe, FLUX, da.PLADIS(), **texts)
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    assert any("it returned" in note for note in report().notes)
    assert backend.calls


def test_a_backend_without_gradients_gives_way(register, monkeypatch):
    pipe = tiny_pipeline(FLUX)
    pipe.transformer.requires_grad_(False)
    register("sage")
    whole = Backend.__call__
    monkeypatch.setattr(Backend, "__call__", lambda self, *args: whole(self, *args).detach())
    for layer in layers_of(FAMILIES[FLUX], "transformer", pipe.transformer):
        layer.module.processor._attention_backend = AttentionBackendName("sage")
    text = tiny_inputs(FLUX, batch=2)["prompt_embeds"].requires_grad_()
    base = type(pipe)
    pipe.__class__ = type(base.__name__, (base,), {"__call__": base.__call__.__wrapped__})
    with da.apply(pipe, nag(), da.PLADIS()) as session, torch.enable_grad():
        inputs = tiny_inputs(FLUX, batch=2, steps=1) | {
            "prompt_embeds": text,
            "output_type": "latent",
        }
        pipe(**inputs)[0].square().mean().backward()
    assert text.grad is not None
    assert text.grad.abs().max() > 0
    assert any("carries no gradient" in note for note in session.report().notes)


def test_a_device_out_of_memory_is_not_a_backend_that_cannot_serve(register):
    def fail(query, value, mask):
        raise torch.OutOfMemoryError("out of memory")

    pipe = tiny_pipeline(FLUX)
    register("flash", refuses=fail)
    function = Registry._backends[AttentionBackendName("flash")]
    pipe.transformer.set_attention_backend("flash")
    with pytest.raises(torch.OutOfMemoryError):
        run(pipe, FLUX, nag())
    assert Registry._backends[AttentionBackendName("flash")] is function


def memory_efficient(calls, factor=1.0):
    """Stands for xformers' function, in plain arithmetic: heads among the rows."""

    def attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        calls.append((query.shape, attn_bias is not None))
        if attn_bias is not None:
            assert attn_bias.shape == (query.shape[0], query.shape[1], key.shape[1])
            assert attn_bias.stride(-2) % 8 == 0
        scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if attn_bias is None else scores + attn_bias
        return scores.softmax(-1) @ value * factor

    return attention


@pytest.mark.parametrize("technique", [nag(), da.PLADIS()], ids=["NAG", "PLADIS"])
@pytest.mark.parametrize(
    ("name", "processor", "count"),
    [
        (SD, XFormersAttnProcessor, 4),
        ("PixArtAlphaPipeline", XFormersAttnProcessor, 2),
        ("StableDiffusion3Pipeline", XFormersJointAttnProcessor, 2),
    ],
)
def test_xformers_in_its_processors(monkeypatch, name, processor, count, technique):
    """Text layers run xformers' function, with masks and without."""
    pipe, texts = doubles(name)
    expected, _ = run(pipe, name, technique, **texts)
    calls = []
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient(calls))
    function = ops.memory_efficient_attention
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    places = {key: processor() for key in model_of(pipe).attn_processors}
    model_of(pipe).set_attn_processor(places)
    got, report = run(pipe, name, technique, **texts)
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    assert calls
    dense = "xformers" in report().backends
    assert dense is (technique != da.PLADIS() or name == "StableDiffusion3Pipeline")
    assert not dense or report().backends == {"xformers": count}
    assert ops.memory_efficient_attention is function


def test_xformers_that_has_no_kernel_gives_way(monkeypatch):
    def attention(*args, **kwargs):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    pipe = tiny_pipeline(SD)
    expected, _ = run(pipe, SD, nag())
    ops = SimpleNamespace(memory_efficient_attention=attention)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    processor = XFormersAttnProcessor()
    pipe.unet.set_attn_processor(
        {
            key: processor if "attn2" in key else old
            for key, old in pipe.unet.attn_processors.items()
        }
    )
    got, report = run(pipe, SD, nag())
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    assert any("NotImplementedError: No operator found" in note for note in report().notes)


@pytest.mark.parametrize("name", [SD, FLUX])
def test_a_function_in_the_place_of_torchs_own(monkeypatch, name):
    """People set ``F.scaled_dot_product_attention = sageattn``."""
    pipe, texts = doubles(name)
    calls, builtin = [], F.scaled_dot_product_attention

    def sageattn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        calls.append(query.shape)
        return builtin(query, key, value, attn_mask=attn_mask, **options)

    expected, _ = run(pipe, name, nag(), **texts)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sageattn)
    plain, _ = run(pipe, name, **texts)
    got, report = run(pipe, name, nag(), **texts)
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
    assert set(report().backends) == {sageattn.__qualname__}
    assert F.scaled_dot_product_attention is sageattn
    assert torch.equal(run(pipe, name, Caught(), **texts)[0], plain)


def test_another_thread_calls_the_backend_itself(register):
    """While a layer of this thread is caught."""
    pipe = tiny_pipeline(FLUX)
    seen = []

    def attend(query, value, mask):
        if threading.current_thread() is threading.main_thread() and not seen:
            worker = threading.Thread(target=call)
            worker.start()
            worker.join()

    def call():
        q = torch.ones(1, 3, 2, 4)
        seen.append(dispatch.dispatch_attention_fn(q, q, q, backend="flash"))

    chosen = register("flash", refuses=attend)
    pipe.transformer.set_attention_backend("flash")
    run(pipe, FLUX, nag())
    assert torch.equal(seen[0], torch.ones(1, 3, 2, 4))
    assert (torch.Size([1, 3, 2, 4]), torch.Size([1, 3, 2, 4]), None) in chosen.calls


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
@pytest.mark.few(4)
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
