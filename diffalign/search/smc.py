"""Sequential Monte Carlo: particles that are weighted and copied while they are denoised."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal

import torch

from diffalign.core import (
    BudgetExceeded,
    Info,
    Lineage,
    Method,
    Move,
    Problem,
    State,
    Tensor,
    UnsupportedModel,
)
from diffalign.core.option import option
from diffalign.core.sampler import join
from diffalign.search.tree import Batch
from diffalign.search.weights import Scheme, Weighted, ancestors, effective_size, log_mean_exp

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
class Passes:
    """Finished populations, and the one in flight."""

    particles: Particles | None = None
    # finished states, one entry a pass, with as many rows as it had particles
    endings: tuple[State, ...] = ()
    lineages: tuple[Lineage, ...] = ()
    scores: tuple[float, ...] = ()
    # log weight of each finished particle; the mean of exp is the estimate of Z
    log_weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class SMC(Method[Passes]):
    """Sample from ``p(x0) exp(tilt * score)``: promising particles are copied, others dropped.

    ``particles`` trajectories run together. At every scoring their predicted images are scored,
    each is weighted by a potential, and where the weights have become too unequal the particles
    are drawn anew by weight. Along any path the potentials multiply to ``exp(tilt * score)`` of the
    finished image, so the estimate of Z is unbiased. When a pass ends and the budget allows,
    another one starts; ``weighted`` holds the images of all passes.

    Potentials of preset "fk" (Singhal et al. 2025, arXiv:2501.06848): "diff" is the gain since the
    last scoring, "max" the largest score so far, "sum" their sum. Presets with a gradient move each
    step uphill and correct the weights: "tds" (Wu et al. 2023, arXiv:2306.17775) and "das" (Kim et
    al. 2025, arXiv:2501.05803), which lets the score in gradually by ``(1 + tempering) ** i - 1``.
    Differs from the papers: weights stay in log space and are kept where nothing is resampled; all
    that belongs to a particle is copied with it; the published FK "max" starts from 0 and so knows
    no negative scores; the percent of the trajectory stands for DAS's step of a hundred.
    Few particles on one pass are its strength: at large budgets the papers of RBF and DTS find it
    below best-of-N.
    Cost: K trajectories a pass and K decoded and scored images at each scoring. With a gradient
    every step is two evaluations, a backward pass, a decode and a score.
    """

    branches: ClassVar[bool] = True

    _: KW_ONLY
    particles: int = option(8, "trajectories in a population", low=1)
    populations: int = option(1, "populations side by side", low=1)
    tilt: float = option(
        1.0, "images count by exp(tilt * score)", low=0.0, open_low=True, usual=(0.1, 20.0)
    )
    preset: Literal["fk", "tds", "das"] = option("fk", "steering without or with a gradient")
    potential: Potential = option("diff", "what weighs a particle, for preset fk")
    every: int | None = option(
        None, "evaluations from one scoring to the next, none for a fifth of them", low=1
    )
    threshold: float = option(
        0.5, "resample below this share of effective particles; 1 is always", low=0.0, high=1.0
    )
    resampling: Scheme = option("systematic", "how particles are drawn by weight")
    tempering: float = option(0.008, "how fast preset das lets the score in", low=0.0, high=1.0)

    @property
    def gradient(self) -> bool:
        """Whether steps move uphill."""
        return self.preset != "fk"

    def check(self) -> None:
        if self.gradient and self.potential != "diff":
            raise ValueError(
                f"SMC(potential={self.potential!r}) is for preset='fk'; {self.preset} weighs by "
                "the gain. Leave it out."
            )
        if self.gradient and self.every not in (None, 1):
            raise ValueError(
                f"SMC(every={self.every}) must be 1 or None with preset={self.preset!r}, which "
                "scores at every step."
            )

    def refuses(self, problem: Problem) -> str | None:
        if self.gradient and not problem.reward.differentiable:
            return f"preset {self.preset} needs a reward with gradient; preset fk needs none."
        if self.gradient:
            try:
                problem.sampler.std(0)
            except UnsupportedModel as error:
                return f"preset {self.preset} needs a step whose noise is known. {error}"
        return None

    def init(self, problem: Problem) -> Passes:
        return Passes()

    def step(self, problem: Problem, state: Passes) -> tuple[Passes, Info]:
        particles = state.particles or self._start(problem)
        moved = self._moved(problem, particles)
        if moved.state.finished:
            return self._finished(problem, state, moved)
        particles = self._weighted(problem, moved)
        effective = float(effective_size(particles.log_weights).mean())
        step = particles.state.step
        text = f"step {step} of {particles.state.count}, {effective:.1f} effective"
        particles = self._resampled(problem, particles)
        return replace(state, particles=particles), Info(text, {"effective": effective})

    def weighted(self, state: Passes) -> Weighted:
        """Scores and weights of the finished images of all passes."""
        log_weights = torch.tensor(state.log_weights, dtype=torch.float64)
        scores = torch.tensor(state.scores, dtype=torch.float64)
        return Weighted(scores, log_weights, float(log_mean_exp(log_weights)))

    def samples(self, problem: Problem, state: Passes, count: int) -> Tensor:
        """``count`` images [count, 3, H, W] drawn by their weights; costs their decodes only."""
        picks = self.weighted(state).pick(count, problem.rng)
        distinct = sorted(set(picks))
        rows = [(ending, row) for ending in state.endings for row in range(len(ending.latents))]
        images = problem.decode(join([rows[i][0].select([rows[i][1]]) for i in distinct]))
        return images[[distinct.index(pick) for pick in picks]]

    def temper(self, step: int, count: int) -> float:
        """Share of the score that counts at an evaluation, 1 at the end."""
        if self.preset != "das" or step >= count:
            return 1.0
        share: float = (1.0 + self.tempering) ** (100.0 * step / count) - 1.0
        return min(share, 1.0)

    def _every(self, count: int) -> int:
        """Evaluations from one scoring to the next."""
        return 1 if self.gradient else self.every or max(1, round(count / 5))

    def _start(self, problem: Problem) -> Particles:
        """As many particles as the budget lets run to the end."""
        count = problem.sampler.count
        scores = -(-count // self._every(count))
        images = self.particles * self.populations
        if self.gradient:  # each evaluation twice
            images = problem.room(2 * images, scores=-(-(scores + 1) // 2)) // 2
            if images < 1:
                raise BudgetExceeded("The budget holds no particle: a gradient doubles its price.")
        else:
            images = problem.room(images, scores=scores)
        size = min(self.particles, images)
        shape = (images // size, size)
        seeds = problem.seeds(shape[0] * size)
        state = problem.start(seeds)
        lineages = tuple(Lineage((Move(0, seed),)) for seed in seeds)
        zeros = torch.zeros(shape, dtype=torch.float64)
        level = zeros - math.inf if self.potential == "max" else zeros
        particles = Particles(state, lineages, zeros, zeros[:, 0], zeros, level)
        return self._weighted(problem, particles) if self.gradient else particles

    def _moved(self, problem: Problem, particles: Particles) -> Particles:
        """The particles at the next scoring; a step uphill corrects their weights."""
        state = particles.state
        every = self._every(state.count)
        until = min((state.step // every + 1) * every, state.count)
        std = problem.sampler.std(state.step) if self.gradient else 0.0
        if particles.gradient is None or not std > 0.0:
            return replace(particles, state=problem.run(state, until))
        slope = self.tilt * self.temper(until, state.count) * std * std
        state = problem.run(state, until, slope * particles.gradient)
        transition = state.transition
        if transition is None:
            raise UnsupportedModel("The sampler does not say how its last step drew the latents.")
        correction = transition.log_p(state.latents) - transition.log_q(state.latents)
        log_weights = particles.log_weights + correction.cpu().view_as(particles.log_weights)
        return replace(particles, state=state, log_weights=log_weights)

    def _weighted(self, problem: Problem, particles: Particles) -> Particles:
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

    def _resampled(self, problem: Problem, particles: Particles) -> Particles:
        """The particles drawn by weight in the populations whose weights are too unequal."""
        log_weights, state = particles.log_weights, particles.state
        count = log_weights.shape[1]
        chosen = effective_size(log_weights) < self.threshold * count
        if self.threshold == 1.0:
            chosen = torch.ones_like(chosen)
        # the last step adds no noise: copies made before it would stay alike
        if count == 1 or not bool(chosen.any()) or state.step >= state.count - 1:
            return particles
        drawn = ancestors(log_weights, self.resampling, problem.rng)
        indices = torch.where(chosen[:, None], drawn, torch.arange(count))
        return particles.permuted(indices, chosen, problem.seeds(len(state.latents)))

    def _finished(
        self, problem: Problem, state: Passes, particles: Particles
    ) -> tuple[Passes, Info]:
        """The passes with one more; the last potential makes the product the image's own."""
        candidates = problem.finish(particles.state, particles.lineages)
        scores = [candidate.score for candidate in candidates]
        final = self.tilt * torch.tensor(scores, dtype=torch.float64)
        log_weights = particles.log_weights + final.view_as(particles.paid) - particles.paid
        total = (particles.log_evidence[:, None] + log_weights).flatten().tolist()
        result = Passes(
            None,
            (*state.endings, Batch.of(particles.state).state),
            (*state.lineages, *particles.lineages),
            (*state.scores, *scores),
            (*state.log_weights, *total),
        )
        weighted = self.weighted(result)
        values = {
            "images": float(len(result.scores)),
            "effective": weighted.effective,
            "log_evidence": weighted.log_evidence,
            "mean": sum(scores) / len(scores),
        }
        text = f"{len(result.scores)} images, {weighted.effective:.1f} effective"
        return result, Info(text, values)
