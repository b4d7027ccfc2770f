"""FIND: a law of start noise for one prompt, learned from scores alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.core.errors import warn_once
from diffalign.core.option import option
from diffalign.core.search import ByChunks, Info, Lineage, Move, Problem
from diffalign.noise_opt.calibration import calibrate
from diffalign.noise_opt.loop import Climb, NoiseMethod, Slope
from diffalign.noise_opt.policy import FLOOR, NoisePolicy, policy_gradient
from diffalign.noise_opt.steps import adam


@dataclass(frozen=True)
class FIND(NoiseMethod):
    """Learn means and deviations of start noise from which any draw suits the prompt.

    The sampler is one action: noise is drawn from the law, the image is scored, and the law moves
    by the score's advantage times the gradient of its log density. Nothing is differentiated, so
    any sampler and any reward will do. The ratio of densities to normal noise is the exponential of
    the mean log ratio over the values, clipped. The best image of all counts, and further images
    cost one run each: ``da.NoisePolicy.of(result.findings).draw(seeds)`` is their ``latents=``.

    ``calibration``: what is taken from a score to give its advantage. ``leave-one-out`` is the mean
    of the other images of the step, ``mean`` that of all steps before, ``learned`` the paper's
    small network, which predicts the score from the law.

    Paper: Chen et al. 2024, arXiv:2407.19453.
    Differs from the paper: each noise is paired with its own score; leave-one-out calibration by
    default; the network does not see the prompt, which is one in a run; noise in the steps is the
    sampler's own affair.
    Cost: iterations x batch + draws trajectories, as many decoded and scored images.
    """

    iterations: int = option(150, "updates of the law", low=1)
    batch: int = option(4, "images of one update", low=1)
    rate: float = option(1e-3, "learning rate of AdamW", low=0.0, open_low=True)
    weight: float = option(10.0, "factor of the advantages beside the penalty", low=0.0)
    penalty: float = option(0.01, "weight of the distance from normal noise", low=0.0)
    distance: Literal["l2", "kl"] = option("l2", "the published distance, or the divergence")
    clip: float = option(
        0.2, "reach of the ratio of densities around 1", low=0.0, high=1.0, open_low=True
    )
    calibration: Literal["leave-one-out", "mean", "learned"] = option(
        "leave-one-out", "what a score is compared with"
    )
    std: Literal["learned", "fixed"] = option("learned", "whether deviations change too")
    draws: int = option(4, "images drawn from the law at the end", low=1)
    project: bool = option(False, "scale the last draws to the norm of normal noise")

    def check(self) -> None:
        if self.calibration == "leave-one-out" and self.batch < 2:
            raise ValueError(
                f"FIND(calibration='leave-one-out') compares the images of a step; batch must be "
                f"at least 2, got {self.batch}. Use calibration='mean'."
            )

    @property
    def chunks(self) -> ByChunks:
        return "can"

    @property
    def total(self) -> int | None:
        return self.iterations * self.batch + self.draws

    def begin(self, problem: Problem, state: Climb) -> Climb:
        noise = problem.sampler.noise([0])[0].float()
        return Climb(torch.stack([torch.zeros_like(noise), torch.ones_like(noise)]), rate=self.rate)

    def closes(self, problem: Problem, state: Climb) -> bool:
        both = self.batch + self.draws
        return state.iteration == self.iterations or problem.room(both) < both

    def look(self, problem: Problem, state: Climb, point: Tensor) -> Slope:
        policy = NoisePolicy(point[0], point[1])
        noise, scores = self._images(problem, policy, self.batch)
        means, memory = calibrate(self.calibration, scores, point, state.memory)
        gradient = policy_gradient(
            noise, scores - means, policy, self.clip, (self.weight, self.penalty), self.distance
        )
        if self.std == "fixed":
            gradient[1] = 0.0
        spread = float(policy.std.mean())
        numbers = {"norm": policy.norm, "shift": float(policy.mean.norm()), "std": spread}
        return Slope(gradient, float(scores.mean()), numbers, memory=memory)

    def move(self, state: Climb, point: Tensor, slope: Slope) -> Climb:
        update, moments = adam(slope.gradient, state.moments)
        after = point + state.rate * update
        if self.std == "fixed":
            after[1] = 1.0
        after[1].clamp_(min=FLOOR)
        return replace(state, point=after, moments=moments)

    def close(self, problem: Problem, state: Climb, point: Tensor) -> tuple[Climb, Info]:
        policy = NoisePolicy(point[0], point[1])
        if abs(policy.norm - 1) > 0.1 and not self.project:
            warn_once(
                f"FIND: draws have {policy.norm:.2f} times the norm of normal noise; "
                "project=True puts them back.",
            )
        _, scores = self._images(problem, policy, problem.room(self.draws), self.project)
        mean = float(scores.mean())
        numbers = {"score": mean, "norm": policy.norm, "first": state.first or mean}
        return replace(state, ended=True), Info("draws from the law", numbers)

    def _images(
        self, problem: Problem, policy: NoisePolicy, count: int, project: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Noise [B, ...] from the law and the scores [B] of its images, float64."""
        seeds = problem.seeds(count)
        noise = policy.shifted(problem.sampler.noise(seeds).float(), project)
        lineages = [Lineage((Move(0, seed),), row) for seed, row in zip(seeds, noise)]
        candidates = problem.finish(problem.run(problem.start(seeds, noise)), lineages)
        scores = [candidate.score for candidate in candidates]
        return noise, torch.tensor(scores, dtype=torch.float64)

    def findings(self, state: Climb) -> dict[str, Tensor]:
        return {} if state.point is None else {"mean": state.point[0], "std": state.point[1]}

    def place(self, state: Climb) -> str:
        return f"update {state.iteration} of {self.iterations}"
