"""ReNO: gradient ascent of a reward in the start noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from diffalign.core.option import option
from diffalign.core.search import Info, Lineage, Method, Move, Problem
from diffalign.noise_opt.norm import chi_gradient, clipped, usual_rate

TRIES = 3
"""How often a gradient that is not finite halves the rate before the ascent ends."""


@dataclass(frozen=True, slots=True)
class Climb:
    """Where an ascent stands."""

    # [1, ...] as ``latents=``, float32; None before the start
    noise: Tensor | None = None
    momentum: Tensor | None = None
    # of later noise, the same in every iteration
    seed: int = 0
    rate: float = 0.0
    iteration: int = 0
    # the noise before the last update, to go back to
    last: Tensor | None = None
    failures: int = 0
    ended: bool = False


@dataclass(frozen=True)
class ReNO(Method[Climb]):
    """Climb from one start noise: each iteration renders the image, scores it and follows the
    gradient of the reward, with a pull towards the norm of Gaussian noise; the best image counts.

    Made for one-step generators; trajectories of several steps are checkpointed. The result is
    never worse than the first image. Nesterov momentum and the clip are those of the paper's code.

    Paper: Eyring et al. 2024, "ReNO: enhancing one-step text-to-image models through reward-based
    noise optimization", arXiv:2406.04312, section 3.
    Differs from the paper: the rate grows with the square root of the noise's size; the text is
    encoded once; one reward, which may be ``rewards.Weighted``.
    Cost: an iteration is one trajectory, its backward pass (about two more; three when it is
    checkpointed), one decode and one score.
    Raises: ValueError for rewards without gradient.
    """

    needs_gradient = True

    iterations: int = option(50, "images rendered, the first one included", low=1)
    rate: float | None = option(
        None, "learning rate, none for 5 sqrt(d / 16384) with d values", low=0.0, open_low=True
    )
    momentum: float = option(0.9, "of Nesterov's method", low=0.0, high=1.0, open_high=True)
    clip: float | None = option(
        0.1, "largest norm of the gradient, none for no limit", low=0.0, open_low=True
    )
    regulariser: float = option(0.01, "weight of the log density of the noise's norm", low=0.0)
    weight: float = option(1.0, "factor of the reward beside the regulariser", low=0.0)
    gradient: Literal["checkpoint", "skip", "one_step", "plain"] = option(
        "checkpoint", "how the backward pass keeps what it needs"
    )
    clamp: Literal["hard", "straight_through"] = option(
        "hard", "whether saturated pixels stop the gradient"
    )

    @property
    def ends(self) -> bool:
        return True

    def refuses(self, problem: Problem) -> str | None:
        if self.gradient == "one_step" and problem.sampler.count != 1:
            return (
                f"gradient='one_step' needs a trajectory of one evaluation; this one has "
                f"{problem.sampler.count}. Use gradient='checkpoint'."
            )
        return None

    def init(self, problem: Problem) -> Climb:
        return Climb()

    def step(self, problem: Problem, state: Climb) -> tuple[Climb, Info]:
        problem.room(1)
        state = self._start(problem) if state.noise is None else state
        noise: Any = state.noise
        if state.iteration == self.iterations - 1:
            return self._finish(problem, state, noise)
        ascent = problem.ascend(noise, [state.seed], mode=self.gradient, clamp=self.clamp)
        climb = self.weight * ascent.gradients[0] + self.regulariser * chi_gradient(noise)
        if not climb.isfinite().all():
            return self._retreat(state)
        gradient = clipped(climb, self.clip)
        buffer = gradient if state.momentum is None else self.momentum * state.momentum + gradient
        update = gradient + self.momentum * buffer
        after = replace(
            state,
            noise=noise + state.rate * update,
            momentum=buffer,
            last=noise,
            iteration=state.iteration + 1,
        )
        score = float(ascent.scores[0])
        norm = float(noise.norm())
        numbers = {"score": score, "norm": norm, "gradient": float(climb.norm())}
        return after, Info(f"iteration {after.iteration} of {self.iterations}", numbers)

    def _start(self, problem: Problem) -> Climb:
        (seed,) = problem.seeds(1)
        noise = problem.start([seed]).latents.float()
        rate = usual_rate(noise.shape[1:]) if self.rate is None else self.rate
        return Climb(noise=noise, seed=seed, rate=rate)

    def _finish(self, problem: Problem, state: Climb, noise: Tensor) -> tuple[Climb, Info]:
        """The last image needs no gradient."""
        images = problem.run(problem.start([state.seed], noise))
        lineage = Lineage((Move(0, state.seed),), noise=noise[0])
        (candidate,) = problem.finish(images, [lineage])
        done = replace(state, iteration=self.iterations, ended=True)
        return done, Info(f"iteration {self.iterations}", {"score": candidate.score})

    def _retreat(self, state: Climb) -> tuple[Climb, Info]:
        """Back to the noise before, at half the rate; after three times the ascent ends."""
        failures = state.failures + 1
        back = replace(
            state,
            noise=state.last if state.last is not None else state.noise,
            momentum=None,
            rate=state.rate / 2,
            failures=failures,
            ended=failures >= TRIES or state.last is None,
        )
        return back, Info("a gradient that is not finite", {"failures": failures})

    def finished(self, state: Climb) -> bool:
        return state.ended
