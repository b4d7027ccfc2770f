"""What gradient methods share: options, the pulls towards normal noise, Nesterov's update."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.core.errors import warn_once
from diffalign.core.option import option
from diffalign.core.search import Ascent, Info, Least, Lineage, Move, Problem
from diffalign.noise_opt.loop import Climb, NoiseMethod, Slope
from diffalign.noise_opt.norm import chi_gradient, usual_rate
from diffalign.noise_opt.normality import log_p_gradient
from diffalign.noise_opt.steps import nesterov

GAINS = (1e-3, 1e3)
"""Within these the gradient counts as neither vanished nor exploded on its way to the noise."""
MANY = 10
"""Evaluations above which exact gradients are no longer advised."""
STALL = 10
"""Iterations after which a score that has changed by less than 1% is reported."""


@dataclass(frozen=True)
class Climber(NoiseMethod):
    """Ascent of a differentiable reward in the start noise."""

    needs_gradient = True

    iterations: int = option(50, "images rendered from a start, the first one included", low=1)
    rate: float | None = option(
        None, "learning rate, none for 5 sqrt(d / 16384) with d values", low=0.0, open_low=True
    )
    momentum: float = option(0.9, "of Nesterov's method", low=0.0, high=1.0, open_high=True)
    clip: float | None = option(
        0.1, "largest norm of the gradient, none for no limit", low=0.0, open_low=True
    )
    regulariser: float = option(0.01, "weight of the log density of the noise's norm", low=0.0)
    normality: float = option(
        0.0, "weight of DNO's log probability that the values are independent and normal", low=0.0
    )
    gradient: Literal["checkpoint", "skip", "residual", "one_step", "plain"] = option(
        "checkpoint", "how the backward pass keeps what it needs"
    )
    clamp: Literal["hard", "straight_through"] = option(
        "hard", "whether saturated pixels stop the gradient"
    )
    force: bool = option(
        False, "go on where the gradient vanishes or explodes on its way to the noise"
    )

    @property
    def total(self) -> int | None:
        return self.iterations

    def refuses(self, problem: Problem) -> str | None:
        count = problem.sampler.count
        if self.gradient == "one_step" and count != 1:
            return (
                f"gradient='one_step' needs a trajectory of one evaluation; this one has {count}. "
                "Use gradient='checkpoint'."
            )
        if self.gradient in ("checkpoint", "plain") and count > MANY and not self.force:
            warn_once(
                f"{type(self).__name__}: gradients through {count} evaluations may vanish or "
                "explode. Fewer steps, gradient='skip' or the method find do without them.",
            )
        return None

    def least(self, problem: Problem) -> Least:
        sampler = problem.sampler
        if self.iterations == 1:
            return Least(sampler.price())
        last = sampler.count - 1 if self.gradient in ("skip", "residual") else 0
        return Least(sampler.price(), backward=sampler.price(last))

    def begin(self, problem: Problem, state: Climb) -> Climb:
        (seed,) = problem.seeds(1)
        noise = problem.start([seed]).latents.float()
        rate = usual_rate(noise.shape[1:]) if self.rate is None else self.rate
        return Climb(
            noise,
            seed=seed,
            rate=rate,
            starts=state.starts,
            lost=state.lost,
            choice=state.choice,
            value=state.value,
        )

    def closes(self, problem: Problem, state: Climb) -> bool:
        return state.iteration == self.iterations - 1

    def pull(self, state: Climb, noise: Tensor) -> Tensor:
        """Gradient [1, ...] of the regularisers."""
        total = self.regulariser * chi_gradient(noise)
        if self.normality:
            rng = torch.Generator().manual_seed(state.seed ^ state.iteration)
            total = total + self.normality * log_p_gradient(noise, rng)
        return total

    def ascent(self, problem: Problem, state: Climb, noise: Tensor, parts: bool = False) -> Ascent:
        """One image with its gradients. Raises: LostGradient where they do not reach the noise."""
        ascent = problem.ascend(
            noise, [state.seed], parts=parts, mode=self.gradient, clamp=self.clamp
        )
        if state.iteration == 0 and not self.force:
            check_gain(type(self).__name__, problem.sampler.count, ascent)
        return ascent

    @abstractmethod
    def look(self, problem: Problem, state: Climb, point: Tensor) -> Slope: ...

    def move(self, state: Climb, point: Tensor, slope: Slope) -> Climb:
        update, moments = nesterov(slope.gradient, state.moments, self.momentum)
        return replace(state, point=point + state.rate * update, moments=moments)

    def step(self, problem: Problem, state: Climb) -> tuple[Climb, Info]:
        try:
            after, info = super().step(problem, state)
        except LostGradient as error:
            return self._left(problem, state, error)
        if after.iteration == STALL and after.first is not None and "score" in info.values:
            change = abs(info.values["score"] - after.first)
            if change < 0.01 * abs(after.first):
                warn_once(
                    f"{type(self).__name__}: after {STALL} iterations the score has changed by "
                    "less than 1%. A larger rate, clip=None or regulariser=0 moves more.",
                )
        return after, info

    def _left(self, problem: Problem, state: Climb, error: LostGradient) -> tuple[Climb, Info]:
        """The next start. Raises: the error where no start had a gradient."""
        lost = state.lost + 1
        after = self.over(problem, replace(state, lost=lost))
        if after.ended and lost > state.starts:
            raise error
        warn_once(f"{error} This start ends; the best image so far is kept.")
        return after, Info("a gradient that does not reach the noise", {"lost": lost})

    def close(self, problem: Problem, state: Climb, point: Tensor) -> tuple[Climb, Info]:
        """The last image needs no gradient."""
        images = problem.run(problem.start([state.seed], point))
        lineage = Lineage((Move(0, state.seed),), noise=point[0])
        (candidate,) = problem.finish(images, [lineage])
        after = replace(state, iteration=self.iterations)
        numbers = {"score": candidate.score, "norm": float(point.norm())}
        return self.over(problem, after), Info(self.place(after), numbers)

    def place(self, state: Climb) -> str:
        return f"iteration {state.iteration} of {self.iterations}"


class LostGradient(ValueError):
    """The gradient vanishes or explodes between the image and the start noise."""


def check_gain(name: str, count: int, ascent: Ascent) -> None:
    """Raise LostGradient where the chain carries gradients to the noise far too weakly or strongly.

    The measure is ``|gradient in the noise| / |gradient in the image|`` along the reward's own
    gradient; a reward that is flat at the image says nothing.
    """
    low, high = GAINS
    for gain in ascent.gains.flatten().tolist():
        if gain < low or gain > high:
            what = "vanishes" if gain < low else "explodes"
            raise LostGradient(
                f"{name}: the gradient {what} over {count} evaluations: in the noise it is "
                f"{gain:.1e} times as large as in the image, expected [{low:g}, {high:g}]. Use "
                "fewer steps, gradient='skip' or 'residual', a method without gradients such as "
                "find, or force=True."
            )
