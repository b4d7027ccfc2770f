"""MPS: multi-dimensional preference score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Foreign, Source, file_of, fill, tensors_of
from diffalign.rewards.clip_towers import END, ClipReward, Towers, model_of, token_ids
from diffalign.rewards.network import Placement
from diffalign.rewards.preprocessing import fitted, normalised, wide

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""What counts, for the overall score."""
HEAD = 64
UNUSED = re.compile(r"(inv_freq|position_ids|\.mask|\.pos_emb|norm\.beta|^logit_scale)$")


class Norm(nn.Module):
    """Layer norm without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma)


class SwiGLU(nn.Module):
    """The first half of the last axis times SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def _linear(width: int, after: int) -> nn.Linear:
    return nn.Linear(width, after, bias=False)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [B, N, A 64] of A heads on one shared head of keys and values [B, L, 64]."""
    heads = query.shape[-1] // HEAD
    split = query.view(*query.shape[:-1], heads, HEAD).transpose(1, 2)
    scores = split @ key[:, None].transpose(-1, -2) * HEAD**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    result: Tensor = (scores.softmax(-1) @ value[:, None]).transpose(1, 2).flatten(2)
    return result


class CrossAttention(nn.Module):
    """Image tokens read text tokens; a feed-forward stands beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.to_q, self.to_kv = _linear(width, width), _linear(width, 2 * HEAD)
        self.to_out = _linear(width, width)
        self.ff = nn.Sequential(_linear(width, 8 * width), SwiGLU(), _linear(4 * width, width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(text).chunk(2, dim=-1)
        result: Tensor = self.to_out(_attend(self.to_q(x), key, value, mask)) + self.ff(x)
        return result


class Parallel(nn.Module):
    """Self-attention with rotary positions, and a feed-forward beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.parts = (width, HEAD, HEAD, 8 * width)
        self.fused_attn_ff_proj = _linear(width, sum(self.parts))
        self.attn_out = _linear(width, width)
        self.ff_out = nn.Sequential(SwiGLU(), _linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, -1)
        query = _rotated(query.view(*query.shape[:-1], -1, HEAD)).flatten(-2)
        key = _rotated(key[..., None, :]).flatten(-2)
        result: Tensor = self.attn_out(_attend(query, key, value)) + self.ff_out(hidden)
        return result


def _rotated(x: Tensor) -> Tensor:
    """[B, N, A, 64] turned by the place on the second axis, halves of the last axis as pairs."""
    rates = 10000.0 ** -(torch.arange(0, HEAD, 2, device=x.device, dtype=x.dtype) / HEAD)
    angles = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None, None] * rates
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Residual(nn.Module):
    """A layer whose result is added to its input."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        result: Tensor = x + self.fn(x, *others)
        return result


class Cross(nn.Module):
    """Image tokens [B, N, D] after reading text tokens [B, L, D]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(CrossAttention(width)), Residual(Parallel(width))])
            for _ in range(depth)
        )

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        layers: Foreign = self.layers
        for reads, thinks in layers:
            x = thinks(reads(x, text, mask))
        return x


class MPS(ClipReward):
    """Human preference under a condition: only words of the prompt that have to do with it count.

    The others are masked before the image's tokens read the text. ``condition``: what counts, the
    authors' overall condition by default. ``threshold``: a word counts where its largest product
    with the condition's words is above this share of the prompt's largest; .3 as in the authors'
    evaluation. Differs from their batched code: the share is taken
    within each prompt, so a score does not depend on its neighbours. ``source``: a hub id, folder
    or file of weights in the authors' names; their own file holds Python objects and is refused.
    Paper: Zhang et al. 2024, arXiv:2405.14705. Reads 77 tokens, 224 pixels, centre crop.
    """

    name = "mps"
    span = (0.0, 100.0)
    facts = Facts(
        "MIT",
        "RE-N-Y/mpsv1",
        "1.05 B",
        "1.5 GB + 0.5",
        "general preference (.84 of pairs on HPDv2)",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        condition: str = CONDITION,
        threshold: float = 0.3,
        **placement: Unpack[Placement],
    ) -> None:
        path = file_of(source, ("model.safetensors", "MPS.safetensors"), self.name, revision)
        towers, cross = _parts(tensors_of(path, self.name), self.name)
        super().__init__(towers, **placement)
        self.network = nn.ModuleDict({"image": self.network, "cross": cross.to(self.dtype)})
        self.network.eval().requires_grad_(False)
        self.condition, self.threshold = condition, threshold
        self._tokens: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        with torch.no_grad():
            self._aspects = self.text.tokens(token_ids([condition], self.name))[0]

    def _read(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """Text tokens [77, D], which of them count [77], and the unit feature [D] of a prompt."""
        if prompt not in self._tokens:
            ids = token_ids([prompt], self.name)
            with torch.no_grad():
                tokens = self.text.tokens(ids)[0]
            likeness = (tokens @ self._aspects.T).max(-1).values
            counts = likeness / likeness.max() > self.threshold
            end = int((ids[0] == END).int().argmax())
            self._tokens[prompt] = tokens, counts, F.normalize(tokens[end], dim=-1)
        return self._tokens[prompt]

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalised(fitted(images, self.side, "crop")).to(self.dtype)
        known = [self._read(prompt) for prompt in prompts]
        text, mask, feature = (torch.stack(parts).to(images.device) for parts in zip(*known))
        tokens = self.network["image"].tokens(pixels)
        first = self.network["cross"](tokens, text.to(tokens.dtype), mask)[:, 0]
        cosine = (F.normalize(wide(first), dim=-1) * feature).sum(-1)
        return self.scale * cosine


def _parts(tensors: Mapping[str, Tensor], owner: str) -> tuple[Towers, Cross]:
    """The CLIP model and the cross model of the file."""
    model = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.") and not name.endswith("position_ids")
    }
    cross = {
        name.removeprefix("cross_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("cross_model.") and not UNUSED.search(name)
    }
    towers = Towers.of(model_of(model, owner))
    depth = len({name.split(".")[1] for name in cross})
    network = Cross(len(model["text_projection.weight"]), depth)
    fill(network, cross, owner, "MPS")
    return towers, network
