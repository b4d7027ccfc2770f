"""Attention with other maps, written out: the passes of PAG and SEG by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from diffalign.core import AttentionTechnique
from diffalign.families import family_of
from diffalign.guidance.pag import IdentityMaps
from diffalign.seams.attention.sites import Layer, map_layers
from diffalign.seams.swap import original_class
from diffalign.testing.beside.base import Model


@dataclass(slots=True)
class Maps:
    """How image tokens attend to one another at the layer that runs now."""

    # every image token to itself and the text; else all to what the mean token attends to
    identity: bool
    # tokens of the text in joint layers
    text: int
    # frames of a video
    frames: int
    # whose first attention call is still to come
    layer: Layer | None = None

    def image(self, count: int) -> slice:
        """The image among ``count`` tokens of the layer."""
        assert self.layer is not None
        text = self.text if self.layer.kind == "joint" else 0
        return slice(text, count) if self.layer.text == "first" else slice(0, count - text)

    def scores(self, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        """Changed scores [..., N, N] of queries and keys [..., N, D]."""
        count, image = q.shape[-2], self.image(q.shape[-2])
        if not self.identity:
            part = q[..., image, :]
            frames = part.reshape(*part.shape[:-2], self.frames, -1, part.shape[-1])
            mean = frames.mean(-2, keepdim=True).expand_as(frames).flatten(-3, -2)
            q = torch.cat((q[..., : image.start, :], mean, q[..., image.stop :, :]), -2)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if not self.identity:
            return scores
        hidden = torch.zeros(count, count, dtype=torch.bool)
        hidden[image, image] = True
        return scores.masked_fill(hidden.fill_diagonal_(False), -torch.inf)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """The layer's first attention call, [..., N, D] each."""
        scores = self.scores(q, k, scale)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        self.layer = None
        return scores.softmax(-1) @ v


@contextmanager
def changed_maps(
    pipe: Model, denoiser: str, change: AttentionTechnique | None, text: int, frames: int
) -> Iterator[None]:
    """Within the block the layers that ``change`` names have its attention, in whichever function
    their processors compute it."""
    if change is None:
        yield
        return
    maps = Maps(isinstance(change, IdentityMaps), text, frames)
    family = family_of(original_class(pipe))

    def begin(layer: Layer, *_: object) -> None:
        maps.layer = layer

    def end(*_: object) -> None:
        maps.layer = None

    with ExitStack() as stack:
        for layer in map_layers(family, denoiser, getattr(pipe, denoiser)):
            if change.selects(layer.site):
                before = layer.module.register_forward_pre_hook(partial(begin, layer))
                stack.callback(before.remove)
                stack.callback(layer.module.register_forward_hook(end).remove)
        for place in _functions(maps):
            stack.enter_context(place)
        yield


def _functions(maps: Maps) -> list[Model]:
    """Patches of every function in which processors of diffusers compute attention."""
    functional = torch.nn.functional.scaled_dot_product_attention
    scores = attention_processor.Attention.get_attention_scores

    def native(*args: Model, **options: Model) -> Model:
        if maps.layer is None:
            return functional(*args, **options)
        named = {**dict(zip(("query", "key", "value", "attn_mask"), args)), **options}
        q, k, v = (named[name] for name in ("query", "key", "value"))
        return maps.attention(q, k, v, named.get("attn_mask"), named.get("scale"))

    def sliced(attn: Model, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Model:
        if maps.layer is None:
            return scores(attn, q, k, mask)
        assert mask is None
        return maps.scores(q, k, attn.scale).softmax(-1)

    def dispatched(
        function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **rest: Model
    ) -> Tensor:
        if maps.layer is None:
            return function(query=query, key=key, value=value, **rest)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return maps.attention(q, k, v, rest.get("attn_mask"), rest.get("scale")).transpose(1, 2)

    backends = _AttentionBackendRegistry._backends
    patches = [
        patch.object(torch.nn.functional, "scaled_dot_product_attention", native),
        patch.object(attention_processor.Attention, "get_attention_scores", sliced),
        patch.dict(backends, {name: partial(dispatched, f) for name, f in backends.items()}),
    ]
    ops = getattr(getattr(attention_processor, "xformers", None), "ops", None)
    if ops is not None:
        efficient = ops.memory_efficient_attention

        def folded(q: Tensor, k: Tensor, v: Tensor, **rest: Model) -> Model:
            if maps.layer is None:
                return efficient(q, k, v, **rest)
            return maps.attention(q, k, v, rest.get("attn_bias"), rest.get("scale"))

        patches.append(patch.object(ops, "memory_efficient_attention", folded))
    return patches
