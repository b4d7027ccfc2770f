"""ReNO: gradient ascent of a reward in the start noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffalign.core.option import option
from diffalign.core.search import Problem
from diffalign.noise_opt.climber import Climber
from diffalign.noise_opt.loop import Climb, Slope
from diffalign.noise_opt.norm import clipped


@dataclass(frozen=True)
class ReNO(Climber):
    """Climb from one start noise: each iteration renders the image, scores it and follows the
    gradient of the reward, with a pull towards the norm of Gaussian noise; the best image counts.

    Made for one-step generators; trajectories of several steps are checkpointed. The result is
    never worse than the first image. Nesterov momentum and the clip are those of the paper's code.

    Paper: Eyring et al. 2024, arXiv:2406.04312, section 3 ("ReNO: enhancing one-step text-to-image
    models through reward-based noise optimization").
    Differs from the paper: the rate grows with the square root of the noise's size; the text is
    encoded once; one reward, which may be ``rewards.Weighted``; DNO's regulariser is an option.
    Cost: an iteration is one trajectory, its backward pass (about two more; three when it is
    checkpointed), one decode and one score.
    Raises: ValueError for rewards without gradient, and where the gradient vanishes or explodes on
    its way to the noise.
    """

    weight: float = option(1.0, "factor of the reward beside the regulariser", low=0.0)

    def look(self, problem: Problem, state: Climb, point: Tensor) -> Slope:
        ascent = self.ascent(problem, state, point)
        climb = self.weight * ascent.gradients[0] + self.pull(state, point)
        numbers = {"norm": float(point.norm()), "gradient": float(climb.norm())}
        gradient = clipped(climb, self.clip)
        return Slope(gradient, float(ascent.scores[0]), numbers, ascent.candidates)
