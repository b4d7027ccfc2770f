"""SAGE's search for a word that is none: an embedding behind a prompt with which it fails."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.core.sampler import Mode
from diffalign.core.search import Candidate, Info, Lineage, Move, Problem
from diffalign.core.words import Shift, Words
from diffalign.noise_opt.hunt import Hunt, Phase
from diffalign.noise_opt.steps import adam

PLACES = ("thing", "object", "photo", "picture", "red", "small", "one")
"""Words whose place the free embedding may take: the first of one token."""
REACH = (0.01, 0.99)
"""The norm of the embedding stays between these points of the vocabulary's norms."""


@dataclass(frozen=True)
class EmbeddingSearch:
    """One free embedding behind the prompt, moved by AdamW over fresh start noises."""

    iterations: int
    # of AdamW, in units of the embeddings' root mean square
    rate: float
    seeds: int
    gradient: Mode

    def search(self, problem: Problem, hunt: Hunt) -> tuple[Hunt, Info]:
        words = problem.sampler.words
        token = self.token(problem)
        table = words.table.float()
        shift = hunt.shift or Shift((token,), torch.zeros(1, table.shape[1]))
        seeds = problem.seeds(self.seeds)
        variant = problem.variant(prompt=self.text(problem))
        noise = variant.start(seeds).latents
        scores, slope = variant.lean(noise, seeds, shift, mode=self.gradient)
        score, number = float(scores.mean()), hunt.iteration + 1
        total = hunt.total + len(seeds)
        if not slope.isfinite().all() or not scores.isfinite().all():
            return replace(hunt, phase="random", total=total), Info("a gradient that is not finite")
        update, moments = adam(slope.cpu().float(), hunt.moments)
        step = self.rate * float(table.square().mean().sqrt())
        moved = bounded(words, table[token].cpu() + shift.values + step * update)
        shift = Shift((token,), moved - table[token].cpu())
        phase: Phase = "fresh" if number == self.iterations else "search"
        after = replace(
            hunt, phase=phase, iteration=number, total=total, shift=shift, moments=moments
        )
        numbers = {"score": score, "embedding": float(moved.norm())}
        return after, Info(f"iteration {number} of {self.iterations}", numbers)

    def token(self, problem: Problem) -> int:
        """The token whose embedding is free."""
        words, prompt = problem.sampler.words, problem.prompt.lower().split()
        for word in PLACES:
            tokens = words.tokens(word)
            if len(tokens) == 1 and word not in prompt:
                return tokens[0]
        return next(i for i in range(len(words.table)) if words.tokens(words.text([i])) == [i])

    def text(self, problem: Problem) -> str:
        """The prompt with the free word behind it."""
        return f"{problem.prompt} {problem.sampler.words.text([self.token(problem)])}"

    def fresh(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        assert hunt.shift is not None
        return self._images(problem, hunt.shift, count)

    def random(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        """The embedding of a random token in its place, another one for each image."""
        table, token = problem.sampler.words.table.float().cpu(), self.token(problem)
        candidates = []
        for _ in range(count):
            other = int(torch.randint(len(table), (), generator=problem.rng))
            shift = Shift((token,), (table[other] - table[token])[None])
            candidates += self._images(problem, shift, 1)
        return candidates

    def _images(self, problem: Problem, shift: Shift, count: int) -> list[Candidate]:
        variant = problem.variant(prompt=self.text(problem), shift=shift)
        seeds = problem.seeds(count)
        lineages = [Lineage((Move(0, seed),)) for seed in seeds]
        return variant.finish(variant.run(variant.start(seeds)), lineages)


def bounded(words: Words, embedding: Tensor) -> Tensor:
    """An embedding [1, D] with its norm within that of ordinary words."""
    norms = words.table.float().norm(dim=1).cpu()
    low, high = (float(norms.quantile(point)) for point in REACH)
    norm = embedding.norm().clamp(min=1e-30)
    scaled: Tensor = embedding * (norm.clamp(low, high) / norm)
    return scaled
