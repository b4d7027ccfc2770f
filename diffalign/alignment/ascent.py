"""One differentiable run from start noise: scores, and the gradient of each part of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.alignment.scoring import Scorer
from diffalign.core.reward import Reward
from diffalign.core.search import Ascent, Candidate
from diffalign.rewards.weighted import parts_of as weighted_parts


@dataclass(frozen=True, slots=True)
class Slopes:
    """What the images of start noise say of a reward's R parts."""

    weights: tuple[float, ...]
    # [R, B], float64 on the CPU
    values: Tensor
    # [R, B, ...] float32 in the noise
    gradients: Tensor
    # [R, B]: norm of the gradient in the noise over that in the image
    gains: Tensor

    @property
    def total(self) -> Tensor:
        """Scores [B] of the whole reward."""
        return torch.tensor(self.weights, dtype=torch.float64) @ self.values

    def ascent(self, candidates: Sequence[Candidate]) -> Ascent:
        """With the images."""
        return Ascent(
            self.total,
            self.values,
            self.weights,
            self.gradients,
            self.gains,
            tuple(candidates),
        )


def parts_of(reward: Reward, prompt: str, parts: bool) -> list[tuple[float, Reward]]:
    """The parts of a reward with their weights for this prompt, or the reward as one part."""
    return weighted_parts(reward, prompt) if parts else [(1.0, reward)]


def slopes_of(
    images: Tensor, noise: Tensor, scorer: Scorer, parts: Sequence[tuple[float, Reward]]
) -> Slopes:
    """Scores of ``images`` [B, ...], which depend on the leaf ``noise`` [B, ...], with gradients.

    One part at a time: its graph ends at the images and is gone before the next one's.
    Cost: a backward pass for each part.
    """
    values, gradients, gains = [], [], []
    for number, (_, reward) in enumerate(parts):
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            scores = scorer.differentiable(leaf, reward)
        (slope,) = torch.autograd.grad(scores.sum(), leaf)
        values.append(scores.detach().to("cpu", torch.float64))
        more = number < len(parts) - 1
        (gradient,) = torch.autograd.grad(images, noise, slope, retain_graph=more)
        gradients.append(gradient.float())
        gains.append(_norms(gradient) / _norms(slope))
    weights = tuple(weight for weight, _ in parts)
    return Slopes(weights, torch.stack(values), torch.stack(gradients), torch.stack(gains))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = rows.detach().flatten(1).to("cpu", torch.float64).norm(dim=1)
    return norms
