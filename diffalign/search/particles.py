"""Particles in flight: how they move, are weighted by potentials and are copied."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffalign.core import BudgetExceeded, Lineage, Move, Problem, State, Tensor, UnsupportedModel
from diffalign.core.search import Least
from diffalign.search.weights import Scheme, ancestors, effective_size, log_mean_exp

Potential = Literal["diff", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Particles:
    """Populations in flight: P of K particles each; rows are population by population."""

    state: State
    lineages: tuple[Lineage, ...]
    # [P, K] since the last resampling, float64
    log_weights: Tensor
    # [P] of the resamplings so far
    log_evidence: Tensor
    # [P, K] sum of the log potentials along each lineage
    paid: Tensor
    # [P, K] what the potential remembers: last, largest or summed score
    level: Tensor
    # [B, ...] of the score of the predicted image in the latents, with a gradient proposal
    gradient: Tensor | None = None

    def permuted(self, indices: Tensor, chosen: Tensor, seeds: list[int]) -> Particles:
        """The particles copied by ``indices`` [P, K], everything of them, with new generators.

        In the populations ``chosen`` [P] the evidence takes in the weights, which become equal.
        """
        populations, count = indices.shape
        rows = (indices + count * torch.arange(populations)[:, None]).flatten().tolist()
        step = self.state.step
        taken = torch.where(chosen, log_mean_exp(self.log_weights), 0.0)
        return Particles(
            self.state.select(rows).reseed(seeds),
            tuple(self.lineages[row].then(step, seed) for row, seed in zip(rows, seeds)),
            torch.where(chosen[:, None], 0.0, self.log_weights),
            self.log_evidence + taken,
            self.paid.gather(1, indices),
            self.level.gather(1, indices),
            None if self.gradient is None else self.gradient[rows],
        )


@dataclass(frozen=True, slots=True)
class Steering:
    """How particles are led to images of high score."""

    tilt: float
    potential: Potential
    # evaluations from one scoring to the next
    every: int
    # steps move uphill
    gradient: bool = False
    # how fast the score is let in, None for at once
    tempering: float | None = None

    def temper(self, step: int, count: int) -> float:
        """Share of the score that counts at an evaluation, 1 at the end."""
        if self.tempering is None or step >= count:
            return 1.0
        share: float = (1.0 + self.tempering) ** (100.0 * step / count) - 1.0
        return min(share, 1.0)

    def least(self, problem: Problem) -> Least:
        """What one particle takes."""
        price, scores = problem.sampler.price(), -(-problem.sampler.count // self.every)
        if not self.gradient:
            return Least(price, scores, scores)
        twice = 2 * -(-(scores + 1) // 2)
        return Least(2 * price, twice, twice, price)

    def start(self, problem: Problem, particles: int, populations: int) -> Particles:
        """As many particles as the budget lets run to the end."""
        least, images = self.least(problem), particles * populations
        if self.gradient:  # each evaluation twice
            images = problem.room(2 * images, scores=least.scores // 2) // 2
            limit, spent = problem.meter.budget.backward, problem.meter.backward
            if limit is not None:
                images = min(images, (limit - spent) // least.backward)
            if images < 1:
                raise BudgetExceeded(
                    "The budget holds no particle: with a gradient one takes "
                    f"{least.rows} NFE and {least.backward} backward passes."
                )
        else:
            images = problem.room(images, scores=least.scores)
        size = min(particles, images)
        shape = (images // size, size)
        seeds = problem.seeds(shape[0] * size)
        lineages = tuple(Lineage((Move(0, seed),)) for seed in seeds)
        zeros = torch.zeros(shape, dtype=torch.float64)
        level = zeros - math.inf if self.potential == "max" else zeros
        fresh = Particles(problem.start(seeds), lineages, zeros, zeros[:, 0], zeros, level)
        return self.weigh(problem, fresh) if self.gradient else fresh

    def move(self, problem: Problem, particles: Particles) -> Particles:
        """The particles at the next scoring; a step uphill corrects their weights."""
        state = particles.state
        until = min((state.step // self.every + 1) * self.every, state.count)
        std = problem.sampler.std(state.step) if self.gradient else 0.0
        if particles.gradient is None or not std > 0.0:
            return replace(particles, state=problem.run(state, until))
        slope = self.tilt * self.temper(until, state.count) * std * std
        drift = slope * particles.gradient
        lineages = tuple(
            lineage.drifted(state.step, row)
            for lineage, row in zip(particles.lineages, drift, strict=True)
        )
        state = problem.run(state, until, drift)
        transition = state.transition
        if transition is None:
            raise UnsupportedModel("The sampler does not say how its last step drew the latents.")
        correction = transition.log_p(state.latents) - transition.log_q(state.latents)
        log_weights = particles.log_weights + correction.cpu().view_as(particles.log_weights)
        return replace(particles, state=state, lineages=lineages, log_weights=log_weights)

    def weigh(self, problem: Problem, particles: Particles) -> Particles:
        """The particles weighted by the scores of their predicted images."""
        state, gradient = particles.state, None
        if self.gradient:
            scores, gradient = problem.twist(state)
            scores = self.temper(state.step, state.count) * scores
        else:
            scores = problem.preview(state)
        scores, level = scores.view_as(particles.level), particles.level
        if self.potential == "diff":
            gain, level = scores - level, scores
        else:
            level = torch.maximum(level, scores) if self.potential == "max" else level + scores
            gain = level
        return replace(
            particles,
            log_weights=particles.log_weights + self.tilt * gain,
            paid=particles.paid + self.tilt * gain,
            level=level,
            gradient=gradient,
        )


def resampled(
    problem: Problem, particles: Particles, threshold: float, scheme: Scheme
) -> Particles:
    """The particles drawn by weight in the populations whose weights are too unequal."""
    log_weights, state = particles.log_weights, particles.state
    count = log_weights.shape[1]
    chosen = effective_size(log_weights) < threshold * count
    if threshold == 1.0:
        chosen = torch.ones_like(chosen)
    # the last step adds no noise: copies made before it would stay alike
    if count == 1 or not bool(chosen.any()) or state.step >= state.count - 1:
        return particles
    drawn = ancestors(log_weights, scheme, problem.rng)
    indices = torch.where(chosen[:, None], drawn, torch.arange(count))
    return particles.permuted(indices, chosen, problem.seeds(len(state.latents)))
