"""Attention techniques in backward passes, in compiled models and beside feature caches."""

import functools
import threading

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from torch.utils.checkpoint import checkpoint

import diffalign as da
from diffalign.seams.denoiser.tap import Generation
from diffalign.testing.calls import model_of, nag, run
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, SD3, FLUX, WAN, QWEN = (
    "StableDiffusionPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "QwenImagePipeline",
)
EPS = torch.finfo(torch.float32).eps


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


SLOW = [SD3, WAN, QWEN, "Lumina2Pipeline"]


@pytest.mark.parametrize(
    "name",
    [SD, FLUX, "ZImagePipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
@pytest.mark.few(1)
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
@pytest.mark.parametrize(
    "window",
    [pytest.param({}, marks=pytest.mark.slow), {"sigma": None, "start": 0.0, "stop": 0.5}],
)
@pytest.mark.few(4)
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
