"""Arithmetic that several families share: how they mix, shrink and hand on a guided prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.core import linear_mix

if TYPE_CHECKING:
    from torch import Tensor


# how the two branches are mixed: (conditional, unconditional, scale) -> guided


def upcast_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of pipelines that mix in float32."""
    return linear_mix(cond.float(), uncond.float(), scale)


# what happens to the guided prediction: (guided, conditional, value of the call argument) -> guided


def renorm(guided: Tensor, cond: Tensor, on: Any) -> Tensor:
    """Each token of ``guided`` is scaled to the norm of ``cond`` along the last axis."""
    import torch

    if not on:
        return guided
    shrunk: Tensor = guided * (
        torch.norm(cond, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
    )
    return shrunk


def rescale(guided: Tensor, cond: Tensor, phi: Any) -> Tensor:
    """Guidance rescale (Lin et al. 2023, arXiv:2305.08891, eq. 15-16).

    The order of operations is that of diffusers' ``rescale_noise_cfg``.
    """
    if not phi > 0.0:
        return guided
    axes = list(range(1, cond.ndim))
    scaled = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    mixed: Tensor = phi * scaled + (1 - phi) * guided
    return mixed


# what scheduler.step receives: (guided, what arrived there) -> what belongs there


def same(guided: Tensor, arrival: Tensor) -> Tensor:
    """The guided prediction itself."""
    return guided


def negated(guided: Tensor, arrival: Tensor) -> Tensor:
    """The guided prediction with the other sign."""
    return -guided


def first_channels(guided: Tensor, arrival: Tensor) -> Tensor:
    """The first channels, of models that also predict a variance."""
    return guided[:, : arrival.shape[1]]


def first_tokens(guided: Tensor, arrival: Tensor) -> Tensor:
    """The first tokens, of editing models that also predict those of the reference image."""
    return guided[:, : arrival.shape[1]]


# the denoiser's timestep -> the scheduler's


def per_thousand(value: float, pipe: Any) -> float:
    """Denoisers that count time from 0 to 1."""
    return value * 1000.0


def backwards(value: float, pipe: Any) -> float:
    """Denoisers that count time from 0 to 1, 1 being the clean image."""
    return (1.0 - value) * 1000.0
