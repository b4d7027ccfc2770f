"""Zero-order search: the best start noise in the neighbourhood of a good one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.core.option import option
from diffalign.core.search import Info, Lineage, Method, Move, Problem


@dataclass(frozen=True, slots=True)
class Pivot:
    """The noise around which the search goes on."""

    # [1, ...], None before the first image and after a restart
    noise: Tensor | None = None
    # of the first image from this start; it fixes every other random number of the neighbours
    seed: int = 0
    score: float = -math.inf
    # rounds in a row without a better neighbour
    stale: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class ZeroOrder(Method[Pivot]):
    """Try neighbours of a start noise, go on from the best one, never to a worse one.

    Paper: Ma et al. 2025, arXiv:2501.09732, section 3 (zero-order search). Its distance 0.95 is
    read as a cosine, as the published code does. There random search wins at equal cost on every
    text-to-image model; use this one to stay near a start.

    Neighbours are ``similarity * n + sqrt(1 - similarity^2) * fresh noise``, which are normal
    noise again (``form="pcn"``, the proposal of Cotter et al. 2013, arXiv:1202.0709), or have
    exactly this cosine and the norm of ``n`` (``form="cosine"``, the published code).
    Differs from the paper: ``patience`` rounds without a better neighbour lead to a restart from
    fresh noise; with 1, as in the published code, none is tried twice.
    Cost: 1 trajectory for each start and ``neighbours`` for each round, all decoded and scored.
    Refuses: samplers that draw noise while they run, where the start noise hardly matters.
    """

    neighbours: int = option(4, "noises tried in one round", low=1)
    similarity: float = option(
        0.95, "cosine between a noise and its neighbours", low=0.0, high=1.0, open_high=True
    )
    form: Literal["pcn", "cosine"] = option("pcn", "how neighbours are drawn")
    patience: int | None = option(
        1, "rounds without a better neighbour before a fresh start, none for no fresh start", low=1
    )
    rounds: int | None = option(None, "rounds, none for as many as the budget allows", low=1)

    seed_level = True

    @property
    def ends(self) -> bool:
        return self.rounds is not None

    def refuses(self, problem: Problem) -> str | None:
        if problem.sampler.branches:
            return (
                "the sampler draws fresh noise at every step, so images of neighbouring start "
                "noises are not alike. Use a deterministic one (DDIM with eta=0, Euler, no "
                "kernel), or a method that searches the noise of the steps, such as beam."
            )
        return None

    def init(self, problem: Problem) -> Pivot:
        return Pivot()

    def step(self, problem: Problem, state: Pivot) -> tuple[Pivot, Info]:
        if state.noise is None:
            return self._start(problem, state)
        count = problem.room(self.neighbours)
        noise = self.neighbourhood(state.noise, count, problem.rng)
        images = problem.run(problem.start([state.seed] * count, noise))
        move = Move(0, state.seed)
        candidates = problem.finish(images, [Lineage((move,), row) for row in noise])
        best = max(range(count), key=lambda i: candidates[i].score)
        rounds, score = state.rounds + 1, candidates[best].score
        values = {"score": score, "pivot": state.score}
        if score > state.score:
            pivot = noise[best : best + 1].clone()
            return Pivot(pivot, state.seed, score, 0, rounds), Info("better neighbour", values)
        stale = state.stale + 1
        if self.patience is not None and stale >= self.patience:
            return Pivot(rounds=rounds), Info("no better neighbour, fresh start", values)
        return Pivot(state.noise, state.seed, state.score, stale, rounds), Info(
            "no better neighbour", values
        )

    def _start(self, problem: Problem, state: Pivot) -> tuple[Pivot, Info]:
        problem.room(1)
        (seed,) = problem.seeds(1)
        start = problem.start([seed])
        (candidate,) = problem.finish(problem.run(start), [Lineage((Move(0, seed),))])
        pivot = Pivot(start.latents, seed, candidate.score, 0, state.rounds)
        return pivot, Info("fresh start", {"score": candidate.score})

    def neighbourhood(self, noise: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """Neighbours [K, ...] of one noise [1, ...], computed in float64 on the CPU."""
        shape = (count, *noise.shape[1:])
        fresh = torch.randn(shape, generator=rng, dtype=torch.float64)
        pivot = noise.detach().to("cpu", torch.float64)
        rest = math.sqrt(1.0 - self.similarity**2)
        if self.form == "pcn":
            neighbours = self.similarity * pivot + rest * fresh
        else:
            flat, other = pivot.flatten(1), fresh.flatten(1)
            norm = flat.norm()
            unit = flat / norm
            other = other - (other @ unit.T) * unit
            other = other / other.norm(dim=1, keepdim=True)
            neighbours = (norm * (self.similarity * unit + rest * other)).reshape(shape)
        return neighbours.to(noise.device, noise.dtype)

    def finished(self, state: Pivot) -> bool:
        return self.rounds is not None and state.rounds >= self.rounds
