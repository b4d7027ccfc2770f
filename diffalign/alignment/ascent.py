"""One differentiable run from start noise: scores, and the gradient of each reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.alignment.scoring import Scorer
from diffalign.core.reward import Reward
from diffalign.core.search import Ascent


def parts_of(reward: Reward, parts: bool) -> list[tuple[float, Reward]]:
    """The weighted parts of a reward, or the reward as one part."""
    weighted: list[tuple[float, Reward]] | None = getattr(reward, "parts", None)
    return weighted if parts and weighted else [(1.0, reward)]


def ascent_of(
    images: Tensor, noise: Tensor, scorer: Scorer, rewards: Sequence[tuple[float, Reward]]
) -> Ascent:
    """Scores of ``images`` [B, ...], which depend on the leaf ``noise`` [B, ...], with gradients.

    Cost: a backward pass for each reward.
    """
    total = torch.zeros(len(noise), dtype=torch.float64)
    gradients = []
    for number, (weight, reward) in enumerate(rewards):
        with torch.enable_grad():
            scores = scorer.differentiable(images, reward)
        more = number < len(rewards) - 1
        (gradient,) = torch.autograd.grad(scores.sum(), noise, retain_graph=more)
        gradients.append(gradient.float())
        total += weight * scores.detach().to("cpu", torch.float64)
    return Ascent(total, torch.stack(gradients))
