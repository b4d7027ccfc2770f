"""``emoji-evaluator``: how well *noisy latents* of ``emoji`` fit a prompt, for choices made while
sampling (``DynamicCFG``).

After the alignment evaluator of Papalampidi et al. 2025 (arXiv:2509.16131), on a small scale.
Residual convolutions, told the noise level, read the 8 x 8 latent cells; then each word of the
prompt, as the frozen text encoder of ``emoji`` states it, looks at the cells and at the other
words. The look is a sum with sigmoid weights instead of an average with softmax weights (Ramapuram
et al. 2024, arXiv:2409.04431), because a sum can count. 0.9 M parameters.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core import Context, UnsupportedModel
from diffalign.core.types import Pipeline
from diffalign.embedded.load import FOLDER

LEVELS = 16
"""Cosines that describe a noise level."""
SIDE = 8


def level_features(sigma: Tensor) -> Tensor:
    """Noise levels [B] (sigma of a variance preserving model) -> [B, 16]: cosines of their
    logarithm, placed in [0, 1]."""
    place = (sigma.float().clamp(0.02, 20.0).log() - torch.log(torch.tensor(0.02))) / torch.log(
        torch.tensor(1000.0)
    )
    return torch.cos(torch.pi * place[:, None] * torch.arange(LEVELS, device=sigma.device))


class _Block(nn.Module):
    """Two convolutions beside the identity; the noise level scales and shifts in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, width)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)]
        )
        self.level = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[:, :, None, None].chunk(2, dim=1)
        hidden = self.convolutions[0](F.silu(self.norms[0](x)))
        result: Tensor = x + self.convolutions[1](
            F.silu(self.norms[1](hidden) * (1 + scale) + shift)
        )
        return result


class _Words(nn.Module):
    """Words look at the cells (a sum with sigmoid weights), then at each other (softmax), then
    think (two-layer perceptron)."""

    def __init__(self, width: int, cells: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.ask, self.offer = nn.Linear(width, width), nn.Linear(cells, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.outs = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.bias = nn.Parameter(torch.full((heads, 1, 1), -2.0))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, words: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
        q = self._heads(self.ask(self.norms[0](words)))
        k, v = (self._heads(part) for part in self.offer(cells).chunk(2, dim=2))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.bias).sigmoid()
        words = words + self.outs[0]((weights @ v / SIDE).transpose(1, 2).flatten(2))
        q, k, v = (self._heads(part) for part in self.qkv(self.norms[1](words)).chunk(3, dim=2))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(
            ~mask[:, None, None], -1e4
        )
        words = words + self.outs[1]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        result: Tensor = words + self.mlp(self.norms[2](words))
        return result


class EvaluatorNet(nn.Module):
    """``forward(latents [B, C, 8, 8], sigma [B], words [B, L, 192], mask bool [B, L]) -> [B]``: the
    logit that the latents show the prompt.

    Latents are in the denoiser's scaling ``alpha * x0 + s * eps``; ``words`` are last hidden states
    of the text encoder of ``emoji``.
    """

    def __init__(
        self,
        channels: int = 16,
        text: int = 192,
        width: int = 96,
        blocks: int = 3,
        words: int = 128,
        layers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(channels, width, 3, padding=1)
            self.level = nn.Sequential(nn.Linear(LEVELS, width), nn.SiLU())
            self.place = nn.Parameter(0.02 * torch.randn(1, width, SIDE, SIDE))
            self.blocks = nn.ModuleList([_Block(width) for _ in range(blocks)])
            self.cell = nn.LayerNorm(width)
            self.read = nn.Linear(text, words)
            self.words = nn.ModuleList([_Words(words, width, 4) for _ in range(layers)])
            self.score = nn.Sequential(nn.LayerNorm(words), nn.Linear(words, 1))

    def look(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """What the latents show: cells [B, 64, width]."""
        x, level = self.stem(latents) + self.place, self.level(level_features(sigma))
        for block in self.blocks:
            x = block(x, level)
        cells: Tensor = self.cell(x.flatten(2).transpose(1, 2))
        return cells

    def compare(self, cells: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Logits [B] of cells against the prompts' words; the words' mean is what is judged."""
        x = self.read(words)
        for layer in self.words:
            x = layer(x, cells, mask)
        weight = mask[:, :, None].to(x.dtype)
        result: Tensor = self.score((x * weight).sum(1) / weight.sum(1)).squeeze(1).float()
        return result

    def forward(self, latents: Tensor, sigma: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        return self.compare(self.look(latents, sigma), words, mask)


def word_mask(ids: Tensor, end: int = 1) -> Tensor:
    """Token ids [B, L] -> True up to and including the first end token."""
    return (ids == end).cumsum(1) - (ids == end).long() == 0


class LatentEvaluator:
    """An ``Evaluator`` of ``DynamicCFG`` for one run: the net, and the prompts as one text per
    image.

    Cost: with five candidates about a quarter of a CFG step of ``emoji`` (one CPU thread, 16
    images: ``benchmarks/dynamic.py``).
    """

    sees: Literal["x0", "next"] = "next"

    def __init__(self, net: EvaluatorNet, pipe: Pipeline, prompts: Sequence[str]) -> None:
        self.net, self.pipe, self.prompts = net, pipe, tuple(prompts)
        self._words: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return "emoji-alignment"

    @torch.no_grad()
    def words(self) -> tuple[Tensor, Tensor]:
        """States [B, L, 192] of the prompts and their mask [B, L], computed once; L is the longest
        prompt's length."""
        if self._words is None:
            if not self.prompts:
                raise ValueError(
                    "emoji-alignment needs the prompts as text; this call gave the pipeline "
                    "embeddings. Pass prompt=..."
                )
            different = sorted(set(self.prompts))
            tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
            ids = tokenizer(
                different,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            mask = word_mask(ids, tokenizer.eos_token_id)
            longest = int(mask.sum(1).max())
            states, order = (
                encoder(ids)[0].float(),
                [different.index(prompt) for prompt in self.prompts],
            )
            self._words = states[order, :longest], mask[order, :longest]
        return self._words

    @torch.no_grad()
    def score(self, latents: Tensor, sigma: float, rows: Sequence[int]) -> Tensor:
        """Logits [B * K], as ``Evaluator.score``."""
        words, mask = self.words()
        places = list(rows)
        level = torch.full((len(latents),), float(sigma), device=latents.device)
        scores: Tensor = self.net.to(latents.device)(
            latents.float(), level, words[places], mask[places]
        )
        return scores


def load_evaluator(folder: Path) -> EvaluatorNet:
    """The net saved in ``folder``, in fp32 on the CPU."""
    net = EvaluatorNet(**json.loads((folder / "config.json").read_text())["net"])
    net.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
    return net.eval().requires_grad_(False)


def alignment(context: Context) -> LatentEvaluator:
    """The evaluator that ``DynamicCFG`` knows as "emoji-alignment", for the call that ``context``
    describes.

    Raises ``UnsupportedModel`` unless autoencoder and text encoder are those of ``emoji``: a latent
    evaluator belongs to one latent space.
    """
    from diffalign.core.identity import model_hash

    folder = FOLDER / "emoji-evaluator"
    facts = json.loads((folder / "config.json").read_text())
    for part in ("vae", "text_encoder"):
        module = getattr(context.pipe, part, None)
        actual = model_hash(module) if module is not None else "none"
        if actual != facts[part]:
            raise UnsupportedModel(
                f"emoji-alignment reads latents and prompts of da.load('emoji') only; the {part} "
                f"of this {context.pipeline} is another one "
                f"(hash {actual}, expected {facts[part]}). Use evaluators=('reward:NAME',), which "
                "decodes, or train one for this model."
            )
    return LatentEvaluator(_loaded(folder), context.pipe, context.prompts)


@functools.cache
def _loaded(folder: Path) -> EvaluatorNet:
    return load_evaluator(folder)
