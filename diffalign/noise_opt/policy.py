"""A law of start noise that is learned: independent normal values with means and deviations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

FLOOR = 1e-4
"""Smallest standard deviation."""


@dataclass(frozen=True, slots=True)
class NoisePolicy:
    """Start noise ``mean + std * z`` of one prompt, z standard normal; ``FIND`` learns it."""

    # [...] each, float32
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, findings: Mapping[str, Tensor]) -> Self:
        """The policy of a result: ``NoisePolicy.of(result.findings)``."""
        return cls(findings["mean"], findings["std"])

    @property
    def norm(self) -> float:
        """``sqrt(E |noise|^2)`` over that of normal noise; 1 is on the shell."""
        square = self.mean.double().square().sum() + self.std.double().square().sum()
        return math.sqrt(float(square) / self.mean.numel())

    def draw(self, seeds: Sequence[int], project: bool = False) -> Tensor:
        """Start noise [B, ...] for ``latents=``, one image per seed.

        ``project``: scaled to the norm ``sqrt(d)`` of normal noise.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        normal = [torch.randn(self.mean.shape, generator=rng) for rng in generators]
        return self.shifted(torch.stack(normal).to(self.mean.device), project)

    def shifted(self, normal: Tensor, project: bool = False) -> Tensor:
        """Noise [B, ...] of standard normal values [B, ...]."""
        noise = self.mean + self.std * normal
        if not project:
            return noise
        norm = noise.flatten(1).norm(dim=1).view(-1, *[1] * self.mean.ndim)
        scaled: Tensor = noise * (math.sqrt(self.mean.numel()) / norm)
        return scaled


def log_ratio(noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over the values of ``log N(noise; mean, std^2) - log N(noise; 0, 1)``, [B].

    The mean and not the sum, as in the published code: over thousands of values the sum leaves any
    band around 0 in one step.
    """
    ratio = (noise.square() - ((noise - mean) / std).square()) / 2 - std.log()
    return ratio.flatten(1).mean(1)


def penalty_of(mean: Tensor, std: Tensor, kind: Literal["l2", "kl"]) -> Tensor:
    """Distance from the standard normal law, mean over the values.

    ``l2`` is ``mean^2 + (std - 1)^2`` as in the published code, ``kl`` the divergence ``(std^2 +
    mean^2 - 1 - log std^2) / 2``.
    """
    if kind == "l2":
        return (mean.square() + (std - 1).square()).mean()
    return ((std.square() + mean.square() - 1) / 2 - std.log()).mean()


def policy_gradient(
    noise: Tensor,
    advantages: Tensor,
    policy: NoisePolicy,
    clip: float,
    weights: tuple[float, float],
    kind: Literal["l2", "kl"],
) -> Tensor:
    """Gradient [2, ...] in mean and deviation of ``w_R mean_b A_b clip(ratio_b) - w_P penalty``.

    ``ratio_b = exp(log_ratio)`` of noise [B, ...], clipped to ``[1 - clip, 1 + clip]``: outside the
    gradient is zero whatever the sign of the advantage [B]. float32, computed in float64.
    """
    with torch.enable_grad():
        mean, std = (t.double().requires_grad_() for t in (policy.mean, policy.std))
        ratios = log_ratio(noise.double(), mean, std).exp().clamp(1 - clip, 1 + clip)
        gain = (advantages.to(ratios) * ratios).mean()
        objective = weights[0] * gain - weights[1] * penalty_of(mean, std, kind)
        gradients = torch.autograd.grad(objective, (mean, std))
    return torch.stack(gradients).float()
