"""CARINOX: several ascents, each reward's gradient clipped on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.core.option import option
from diffalign.core.search import Candidate, Info, Least, Problem
from diffalign.noise_opt.climber import Climber
from diffalign.noise_opt.loop import Climb, Slope
from diffalign.noise_opt.norm import clipped
from diffalign.rewards.weighted import parts_of


@dataclass(frozen=True)
class CARINOX(Climber):
    """Climb from several start noises by the sum of the parts of a reward, each part's gradient
    clipped on its own, so that no part drowns the others; the best image of all counts.

    The reward's parts and their weights are those of ``rewards.Weighted``, or of
    ``rewards.CategoryAware``, whose weights follow from the prompt. ``variant="paper"`` clips the
    gradient of each part plus the regulariser, then weights it, as the method's figure shows.
    ``variant="released"`` is what the published code does: the weight comes before the clip, so it
    cancels where the clip acts, the sum is clipped once more, and the image with the best sum of
    unweighted parts is chosen.

    Paper: Kasaei et al. 2025, arXiv:2509.17458.
    Differs from the paper: the rate grows with the square root of the noise's size; the parts and
    weights are the user's reward, and start noises follow the one seed rule.
    Cost: starts x iterations trajectories, each with a backward pass for each part (about two more;
    three when it is checkpointed), one decode and one score of each part.
    Raises: ValueError for rewards without gradient, and where the gradient vanishes or explodes on
    its way to the noise from every start; a start where it does is left with a warning.
    """

    starts: int = option(5, "start noises", low=1)
    variant: Literal["paper", "released"] = option(
        "paper", "weights after the clip as in the paper, or before it as in the released code"
    )

    @property
    def total(self) -> int | None:
        return self.starts * self.iterations

    def least(self, problem: Problem) -> Least:
        least = super().least(problem)
        parts = len(parts_of(problem.reward, problem.prompt)) if least.backward else 1
        return replace(least, scores=parts, backward=parts * least.backward)

    def look(self, problem: Problem, state: Climb, point: Tensor) -> Slope:
        ascent = self.ascent(problem, state, point, parts=True)
        pull = self.pull(state, point)
        pairs = list(zip(ascent.weights, ascent.gradients, strict=True))
        if self.variant == "paper":
            rows = [weight * clipped(g + pull, self.clip) for weight, g in pairs]
            total = torch.stack(rows).sum(0)
        else:
            rows = [clipped(weight * g + pull, self.clip) for weight, g in pairs]
            total = clipped(torch.stack(rows).sum(0), self.clip)
        numbers = {"norm": float(point.norm()), "gradient": float(total.norm())}
        values = ascent.values[:, 0].tolist()
        numbers |= {"unweighted": sum(values)}
        numbers |= {f"part {number}": value for number, value in enumerate(values, 1)}
        return Slope(total, float(ascent.scores[0]), numbers, ascent.candidates)

    def move(self, state: Climb, point: Tensor, slope: Slope) -> Climb:
        return _chosen(super().move(state, point, slope), slope)

    def close(self, problem: Problem, state: Climb, point: Tensor) -> tuple[Climb, Info]:
        """The released code chooses among all images by the parts, so the last one needs them."""
        if self.variant == "paper":
            return super().close(problem, state, point)
        slope = self.look(problem, state, point)
        after = _chosen(replace(state, iteration=self.iterations), slope)
        numbers = {"score": slope.score, **slope.numbers}
        return self.over(problem, after), Info(self.place(after), numbers)

    def over(self, problem: Problem, state: Climb) -> Climb:
        """The next start, or the end. Several processes share the starts."""
        starts, share = state.starts + 1, -(-self.starts // problem.processes)
        if starts >= share:
            return replace(state, starts=starts, ended=True)
        return Climb(starts=starts, lost=state.lost, choice=state.choice, value=state.value)

    def best(self, problem: Problem, state: Climb) -> Candidate | None:
        return problem.best if self.variant == "paper" else state.choice

    def place(self, state: Climb) -> str:
        number = min(state.starts + 1, self.starts)
        return f"start {number} of {self.starts}, {super().place(state)}"


def _chosen(state: Climb, slope: Slope) -> Climb:
    """The state with the image of this look if its unweighted sum is the best so far."""
    value = slope.numbers["unweighted"]
    if not slope.candidates or (state.choice is not None and value <= state.value):
        return state
    return replace(state, choice=slope.candidates[0], value=value)
