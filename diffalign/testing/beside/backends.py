"""Attention backends. Those that need an accelerator are stood in for by plain arithmetic under
their names, registered with diffusers' own dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from diffalign.core.types import Pipeline
from diffalign.testing.beside.base import Arguments, Neighbour, denoiser_of, nothing

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
FLUX, WAN, QWEN = "FluxPipeline", "WanPipeline", "QwenImagePipeline"


def arithmetic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention written out, [B, L, A, D] as backends of the dispatcher take it."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        shown = attn_mask.dtype.is_floating_point
        scores = scores + attn_mask if shown else scores.masked_fill(~attn_mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@contextmanager
def backend(pipe: Pipeline, name: str, stand_in: bool) -> Iterator[Arguments]:
    """The denoiser on an attention backend of that name."""
    registry, key = _AttentionBackendRegistry, AttentionBackendName(name)
    tables = (registry._backends, registry._constraints, registry._supported_arg_names)
    before, active = [dict(table) for table in tables], registry._active_backend
    model = getattr(pipe, denoiser_of(pipe))
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    if stand_in:
        registry.register(key)(arithmetic)
    for processor in processors:
        processor._attention_backend = key
    registry.set_active_backend(key)
    try:
        yield nothing
    finally:
        for processor in processors:
            del processor._attention_backend
        for table, old in zip(tables, before):
            table.clear()
            table.update(old)
        registry._active_backend = active


@contextmanager
def usual(pipe: Pipeline) -> Iterator[Arguments]:
    """The native backend."""
    yield nothing


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    op: object = None,
    scale: float | None = None,
) -> Tensor:
    """Stands for xformers' function on heads in the batch, [B * A, L, D]."""
    q, k, v = (x.unsqueeze(2) for x in (query, key, value))
    return arithmetic(q, k, v, attn_bias, scale).squeeze(2)


@contextmanager
def xformers(pipe: Pipeline) -> Iterator[Arguments]:
    """The processors of xformers at every layer."""
    model = getattr(pipe, denoiser_of(pipe))
    before, module = dict(model.attn_processors), attention_processor.xformers
    attention_processor.xformers = SimpleNamespace(
        ops=SimpleNamespace(memory_efficient_attention=efficient)
    )
    model.set_attn_processor(attention_processor.XFormersAttnProcessor())
    try:
        yield nothing
    finally:
        model.set_attn_processor(before)
        attention_processor.xformers = module


GROUP = "Attention backends"
MODELS = (FLUX, WAN, QWEN)
NEIGHBOURS = [
    *(
        Neighbour(
            name=name,
            group=GROUP,
            pipelines=MODELS,
            put=partial(backend, name=value, stand_in=stand_in),
            without=usual,
            note="stood in for by plain arithmetic" if stand_in else "",
        )
        for name, value, stand_in in (
            ("native", "native", False),
            ("native, written out", "_native_math", False),
            ("flex", "flex", True),
            ("sage", "sage", True),
            ("flash", "flash", True),
            ("xformers", "xformers", True),
        )
    ),
    Neighbour(
        name="processors of xformers",
        group=GROUP,
        pipelines=(SD, SDXL),
        put=xformers,
        without=usual,
        note="stood in for by plain arithmetic",
    ),
]
