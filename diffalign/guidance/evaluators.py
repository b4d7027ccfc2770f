"""Judges of guidance candidates, and the rule that turns their scores into a choice (for
``DynamicCFG``)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, Protocol, runtime_checkable

import torch

from diffalign.core import Context, Meter, Reward, StepInfo, Tensor, UnsupportedModel
from diffalign.core.registry import Registry


@runtime_checkable
class Evaluator(Protocol):
    """Scores latents of guidance candidates. An evaluator knows its prompts."""

    @property
    def sees(self) -> Literal["x0", "next"]:
        """ "x0" for denoised latents, or "next" for noisy ones as the next step's denoiser gets
        them: ``alpha * x0 + s * eps``."""
        ...

    def score(self, latents: Tensor, sigma: float, rows: Sequence[int]) -> Tensor:
        """Latents [B * K, ...] -> scores [B * K], higher is better.

        ``sigma``: the level they were denoised from, or the next step's. ``rows[j]`` is the image
        that latent ``j`` belongs to.
        """
        ...


EVALUATORS: Registry[Evaluator] = Registry(
    "evaluator",
    "diffalign.evaluators",
    targets={"emoji-alignment": "diffalign.embedded.nets.evaluator:alignment"},
    advice="Others: reward:NAME for any reward, decoded, or an object with score(latents, sigma, "
    "rows).",
)
"""Functions that make an evaluator for one call, from its ``Context``."""
REWARD = "reward:"


def evaluator_named(name: str, context: Context) -> Evaluator:
    """The registered evaluator ``name`` for this call, or "reward:NAME" for any reward through the
    pipeline's decoder.

    Raises: ValueError for an unknown name, ``UnsupportedModel`` where the evaluator cannot read
    this pipeline.
    """
    if name.startswith(REWARD):
        reward = import_module("diffalign.rewards").load(name.removeprefix(REWARD))
        return DecodedReward(decoder_of(context), reward, context.prompts, context.meter)
    return EVALUATORS.get(name)(context)


def decoder_of(context: Context) -> Callable[[Tensor], Tensor]:
    """Latents [B, C, H, W] as the denoiser sees them -> images [B, 3, H, W] in [0, 1], by the
    pipeline's own autoencoder."""
    vae = getattr(context.pipe, "vae", None)
    scaling = getattr(getattr(vae, "config", None), "scaling_factor", None)
    if vae is None or scaling is None:
        raise UnsupportedModel(
            f"reward:NAME needs an autoencoder with a scaling factor; {context.pipeline} has none "
            "here. "
            "Pass DecodedReward(decode, reward, prompts) with a decode function of your own."
        )
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def decode(latents: Tensor) -> Tensor:
        if latents.ndim != 4:
            raise UnsupportedModel(
                f"reward:NAME decodes latents [B, C, H, W]; those of {context.pipeline} have "
                f"shape {list(latents.shape)}."
            )
        images: Tensor = vae.decode((latents / scaling + shift).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    return decode


@dataclass(frozen=True)
class DecodedReward:
    """Any reward as an evaluator: denoised latents -> ``decode`` -> images in [0, 1] -> ``reward``.

    ``prompts``: one per image. ``meter``: charged with the decodes and reward calls, which cost far
    more than latent evaluators.
    """

    decode: Callable[[Tensor], Tensor]
    reward: Reward
    prompts: Sequence[str]
    meter: Meter | None = None
    sees: Literal["x0", "next"] = field(default="x0", init=False)

    def score(self, latents: Tensor, sigma: float, rows: Sequence[int]) -> Tensor:
        if not self.prompts:
            raise ValueError(
                "DecodedReward needs one prompt per image; this call gave the pipeline none as "
                "text. Pass prompt=..."
            )
        if self.meter is not None:
            self.meter.charge(decodes=len(rows), rewards=len(rows))
        return self.reward(self.decode(latents), [self.prompts[row] for row in rows])


def latents_for(
    evaluator: Evaluator,
    cond: Tensor,
    uncond: Tensor,
    candidates: Sequence[float],
    step: StepInfo,
    flow: bool,
) -> tuple[Tensor, float]:
    """What ``evaluator`` looks at: ``[B * K, ...]`` in float32 and the noise level, from native
    predictions.

    The next latents are those of one deterministic first-order step (DDIM, or Euler for flow
    models).
    """
    at = torch.tensor([float(w) for w in candidates], device=cond.device).reshape(
        1, -1, *(1,) * (cond.ndim - 1)
    )

    def spread(space: Literal["eps", "x0"]) -> Tensor:
        c, u = (step.convert(value, "native", space)[:, None].float() for value in (cond, uncond))
        return (u + at * (c - u)).flatten(0, 1)

    x0 = spread("x0")
    if evaluator.sees == "x0":
        return x0, step.sigma
    sigma = step.sigma_next
    if flow:
        return (1.0 - sigma) * x0 + sigma * spread("eps"), sigma
    return (x0 + sigma * spread("eps")) / math.sqrt(1.0 + sigma * sigma), sigma


def preferred(scores: Tensor, before: Tensor | None) -> Tensor:
    """Index of each image's best candidate ``[B]``, or -1 where two or more share the first place.

    ``scores [E, B, K]`` are standardised over K and added with each evaluator's weight: the
    relative improvement of its mean score ``(now - before) / |before|`` since ``before [E, B]``, at
    least 0; equal weights without ``before`` or where nothing improved.
    """
    usable = scores.isfinite().all(2, keepdim=True)
    finite = scores.where(usable, torch.zeros_like(scores))
    deviation = finite.std(2, correction=0, keepdim=True)
    opinion = (
        usable & (finite.amax(2, keepdim=True) > finite.amin(2, keepdim=True)) & (deviation > 0)
    )
    standard = torch.where(
        opinion,
        (finite - finite.mean(2, keepdim=True)) / deviation.clamp_min(1e-30),
        torch.zeros_like(finite),
    )
    weights = torch.ones_like(scores[:, :, 0])
    if before is not None:
        gain = (finite.mean(2) - before) / before.abs().clamp_min(1e-12)
        gain = torch.where(
            gain.isfinite() & opinion[:, :, 0], gain, torch.zeros_like(gain)
        ).clamp_min(0.0)
        weights = torch.where(gain.sum(0, keepdim=True) > 0.0, gain, weights)
    total = (weights[:, :, None] * standard).sum(0)  # [B, K]
    # standardised values are at most sqrt(K - 1); sums of E of them that differ by less than their
    # rounding are equal
    rounding = 16.0 * torch.finfo(total.dtype).eps * math.sqrt(scores.shape[2]) * weights.sum(0)
    alone = (total >= total.amax(1, keepdim=True) - rounding[:, None]).sum(1) == 1
    return torch.where(alone, total.argmax(1), torch.full_like(total.argmax(1), -1))
