"""SAGE's search in start noise: ordinary noise with which a prompt fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.core.sampler import Mode
from diffalign.core.search import Candidate, Info, Lineage, Move, Problem
from diffalign.noise_opt.hunt import Hunt, judged
from diffalign.noise_opt.normality import Normality, log_p_gradient

NEAR = 0.99
"""Cosine between the found noise and the noises around it that confirm it."""


@dataclass(frozen=True)
class LatentSearch:
    """Normalised gradient ascent on the sphere of normal noise; where the noise no longer passes
    for normal, a new start."""

    iterations: int
    rate: float
    normality: float
    gradient: Mode

    def search(self, problem: Problem, hunt: Hunt) -> tuple[Hunt, Info]:
        hunt = self._start(problem, hunt) if hunt.noise is None else hunt
        noise = hunt.noise
        assert noise is not None
        ascent = problem.ascend(noise, [hunt.seed], mode=self.gradient)
        number, total = hunt.iteration + 1, hunt.total + 1
        hunt = replace(hunt, iteration=number, total=total)
        climb = self._climb(noise, ascent.gradients[0], hunt)
        if not ascent.candidates or not climb.isfinite().all():
            return replace(hunt, phase="random"), Info("a gradient that is not finite")
        tally, look = judged(problem, ascent.candidates), Normality.of(noise[0])
        text = f"iteration {number} of {self.iterations}"
        numbers = {
            "score": float(ascent.scores[0]),
            "failure": float(tally.failures),
            "confirmed": float(tally.confirmed),
            "norm": look.norm,
            "normal": float(look.normal),
        }
        if tally.confirmed and look.normal:
            success = replace(hunt, phase="fresh", failure=ascent.candidates[0])
            return success, Info(f"{text}: a confirmed failure", numbers)
        if number == self.iterations:
            return replace(hunt, phase="random"), Info(f"{text}: none", numbers)
        if not look.normal:
            return replace(hunt, noise=None), Info(f"{text}: not normal, a new start", numbers)
        d = noise.numel()
        moved = noise + self.rate * math.sqrt(d) * climb / climb.norm().clamp(min=1e-30)
        return replace(hunt, noise=moved * (math.sqrt(d) / moved.norm())), Info(text, numbers)

    def _start(self, problem: Problem, hunt: Hunt) -> Hunt:
        (seed,) = problem.seeds(1)
        return replace(hunt, noise=problem.start([seed]).latents.float(), seed=seed)

    def _climb(self, noise: Tensor, gradient: Tensor, hunt: Hunt) -> Tensor:
        """The norm needs no pull: it is kept."""
        if not self.normality:
            return gradient
        rng = torch.Generator().manual_seed(hunt.seed ^ hunt.iteration)
        return gradient + self.normality * log_p_gradient(noise, rng)

    def fresh(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        """Noises around the found one: a failure is a region, not a point."""
        assert hunt.noise is not None
        seeds = problem.seeds(count)
        normal = problem.start(seeds).latents.float()
        noise = NEAR * hunt.noise + math.sqrt(1 - NEAR**2) * normal
        return _images(problem, seeds, noise)

    def random(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        return _images(problem, problem.seeds(count), None)


def _images(problem: Problem, seeds: list[int], noise: Tensor | None) -> list[Candidate]:
    rows = [None] * len(seeds) if noise is None else list(noise)
    lineages = [Lineage((Move(0, seed),), row) for seed, row in zip(seeds, rows)]
    return problem.finish(problem.run(problem.start(seeds, noise)), lineages)
