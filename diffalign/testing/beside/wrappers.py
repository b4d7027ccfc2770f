"""Modules around the denoiser, callbacks, and processors of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.beside.base import (
    Arguments,
    Model,
    Neighbour,
    Part,
    Refusal,
    by_name,
    by_seam,
    denoiser_of,
    nothing,
)

SD, SDXL, SD3 = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
FLUX, WAN = "FluxPipeline", "WanPipeline"


class Parallel(nn.Module):
    """What data-parallel wrappers are to a pipeline that reads facts of its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)  # type: ignore[no-any-return]

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def adapted(model: Model) -> Model:
    """A PeftModel with an adapter of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        return get_peft_model(model, config).eval()


@contextmanager
def wrapped(pipe: Pipeline, *wraps: Callable[[Model], Model]) -> Iterator[Arguments]:
    """The denoiser inside one wrapper after the other, the innermost first."""
    name = denoiser_of(pipe)
    model = before = getattr(pipe, name)
    for wrap in wraps:
        model = wrap(model)
    setattr(pipe, name, model)
    try:
        yield nothing
    finally:
        setattr(pipe, name, before)


@contextmanager
def adapter(pipe: Pipeline) -> Iterator[Arguments]:
    """The same adapter in the model itself, without a wrapper."""
    model = getattr(pipe, denoiser_of(pipe))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(config)
    yield nothing


@contextmanager
def bare(pipe: Pipeline) -> Iterator[Arguments]:
    """The denoiser itself."""
    yield nothing


def faded(pipe: Pipeline, index: int, time: object, tensors: Keywords) -> Keywords:
    """A callback that changes the latents."""
    return {"latents": 0.99 * tensors["latents"]}


@contextmanager
def callback(pipe: Pipeline) -> Iterator[Arguments]:
    """A callback after each step that changes the latents."""

    def arguments(part: Part) -> Keywords:
        return {} if part.led else {"callback_on_step_end": faded}

    yield arguments


class Watching(ModelHook):  # type: ignore[misc, unused-ignore]
    """A model hook of another package, which changes what a block returns."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 1.01


@contextmanager
def hooked(pipe: Pipeline) -> Iterator[Arguments]:
    """A model hook of diffusers on the first block's attention output."""
    model = getattr(pipe, denoiser_of(pipe))
    layer = next(m for n, m in model.named_modules() if n.endswith("to_out.0"))
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(Watching(), "watching")
    try:
        yield nothing
    finally:
        registry.remove_hook("watching")


class Softened:
    """A processor of another package: keys scaled by a half, through torch's attention."""

    def __call__(
        self,
        attn: Model,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        out = F.scaled_dot_product_attention(q, 0.5 * k, v)
        return finished(attn, out)


class Hidden:
    """The same written out, so that nobody sees an attention call."""

    def __call__(
        self,
        attn: Model,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        q, k, v = projected(attn, hidden_states, encoder_hidden_states)
        weights = (q @ (0.5 * k).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return finished(attn, weights @ v)


def projected(attn: Model, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, A, L, D] each."""
    source = hidden if text is None else text
    parts = (attn.to_q(hidden), attn.to_k(source), attn.to_v(source))
    return tuple(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)


def finished(attn: Model, out: Tensor) -> Tensor:
    """The layer's output from what attention returned, [B, A, N, D]."""
    for layer in attn.to_out:
        out = layer(out.transpose(1, 2).flatten(2) if out.ndim == 4 else out)
    return out


@contextmanager
def processed(pipe: Pipeline, cls: type) -> Iterator[Arguments]:
    """Another package's processor at every layer."""
    model = getattr(pipe, denoiser_of(pipe))
    before = dict(model.attn_processors)
    model.set_attn_processor(cls())
    try:
        yield nothing
    finally:
        model.set_attn_processor(before)


GROUP = "Wrappers, hooks and processors"
UNSEEN = "calls of attention that diffalign can follow"
MODELS = (SD, FLUX, SD3, SDXL, WAN)
NEIGHBOURS = [
    Neighbour(
        name="PeftModel",
        group=GROUP,
        pipelines=MODELS,
        put=lambda pipe: wrapped(pipe, adapted),
        without=adapter,
        bound=0.0,
    ),
    Neighbour(
        name="a data-parallel wrapper",
        group=GROUP,
        pipelines=MODELS,
        put=lambda pipe: wrapped(pipe, Parallel),
        without=bare,
        bound=0.0,
    ),
    Neighbour(
        name="a data-parallel wrapper around a PeftModel",
        group=GROUP,
        pipelines=(SD, FLUX),
        put=lambda pipe: wrapped(pipe, adapted, Parallel),
        without=adapter,
        bound=0.0,
    ),
    Neighbour(
        name="a callback that changes the latents",
        group=GROUP,
        pipelines=MODELS,
        put=callback,
    ),
    Neighbour(
        name="a model hook of another package",
        group=GROUP,
        pipelines=MODELS,
        put=hooked,
    ),
    Neighbour(
        name="another package's processor",
        group=GROUP,
        pipelines=(SD, SDXL),
        put=partial(processed, cls=Softened),
        without=partial(processed, cls=Softened),
    ),
    Neighbour(
        name="another package's processor without an attention call",
        group=GROUP,
        pipelines=(SD, SDXL),
        put=partial(processed, cls=Hidden),
        refusals=(
            Refusal(by_seam("attention"), UNSEEN),
            Refusal(by_name("pag", "seg"), UNSEEN),
        ),
    ),
]
