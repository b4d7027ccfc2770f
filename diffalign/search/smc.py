"""Sequential Monte Carlo: particles that are weighted and copied while they are denoised."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal

import torch

from diffalign.core import Info, Method, Problem, State, Tensor, UnsupportedModel
from diffalign.core.option import option
from diffalign.core.sampler import join
from diffalign.core.search import Least
from diffalign.search.particles import Particles, Potential, Steering, resampled
from diffalign.search.tree import Batch
from diffalign.search.weights import Scheme, Weighted, effective_size, log_mean_exp


@dataclass(frozen=True, slots=True)
class Passes:
    """Finished populations, and the one in flight."""

    particles: Particles | None = None
    # finished states, one entry a pass, with as many rows as it had particles
    endings: tuple[State, ...] = ()
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

    def steering(self, count: int) -> Steering:
        """How particles are led along a trajectory of ``count`` evaluations."""
        every = 1 if self.gradient else self.every or max(1, round(count / 5))
        tempering = self.tempering if self.preset == "das" else None
        return Steering(self.tilt, self.potential, every, self.gradient, tempering)

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
        if self.gradient and not getattr(problem.reward, "differentiable", False):
            return f"preset {self.preset} needs a reward with gradient; preset fk needs none."
        if self.gradient:
            try:
                problem.sampler.std(0)
            except UnsupportedModel as error:
                return f"preset {self.preset} needs a step whose noise is known. {error}"
        return None

    def least(self, problem: Problem) -> Least:
        return self.steering(problem.sampler.count).least(problem)

    def init(self, problem: Problem) -> Passes:
        return Passes()

    def step(self, problem: Problem, state: Passes) -> tuple[Passes, Info]:
        steering = self.steering(problem.sampler.count)
        particles = state.particles or steering.start(problem, self.particles, self.populations)
        moved = steering.move(problem, particles)
        if moved.state.finished:
            return self._finished(problem, state, moved)
        particles = steering.weigh(problem, moved)
        effective = float(effective_size(particles.log_weights).mean())
        step = particles.state.step
        text = f"step {step} of {particles.state.count}, {effective:.1f} effective"
        particles = resampled(problem, particles, self.threshold, self.resampling)
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
