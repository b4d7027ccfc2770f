"""Fit LinearAG policies: run plain CFG, stream inner products, solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear_ag import Trajectories, identity_of
from .linear_policy import LinearPolicy, Mode, default_plan, solve


class Gram:
    """Inner products of every pair of predictions, streamed in float64: memory (2S)^2, whatever the number of trajectories."""

    def __init__(self, steps: int) -> None:
        self.products = torch.zeros(2 * steps, 2 * steps, dtype=torch.float64)
        self.sums = torch.zeros(2 * steps, dtype=torch.float64)
        self.size = self.trajectories = 0
        self.shape: tuple[int, ...] = ()

    def add(self, cond: Tensor, uncond: Tensor, shape: tuple[int, ...]) -> None:
        """``cond``, ``uncond`` [B, S, n]: the noise predictions of B images."""
        for row in torch.cat([cond, uncond], dim=1).double().cpu():
            self.products += row @ row.T
            self.sums += row.sum(1)
        self.size += cond.shape[0] * cond.shape[2]
        self.trajectories += cond.shape[0]
        self.shape = shape


def fit_linear_ag(
    pipe: Any,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int = 20,
    negative_prompt: str = "",
    plan: Sequence[Mode] | None = None,
    batch: int = 16,
    seed: int = 0,
    ridge: float = 1e-6,
    progress: Callable[[int], None] = lambda done: None,
    **call: Any,
) -> LinearPolicy:
    """One trajectory of plain CFG per prompt on ``pipe`` as it is, then one least-squares problem per estimated step.

    ``scale``: guidance scale, 1 = off. ``call``: further arguments of the pipeline (size, ...). The paper used 200 trajectories.
    Cost: ``2 * steps * len(prompts)`` denoiser rows; the solve takes milliseconds.
    Raises ValueError for a plan that does not fit, and whatever ``apply`` raises for the pipeline.
    """
    from diffalign.adapters import apply

    chosen = tuple(plan) if plan is not None else default_plan(steps)
    if len(chosen) != steps or chosen[0] != "guided" or not {"estimated"} <= set(chosen) <= {"guided", "estimated", "conditional"}:
        raise ValueError(
            f"plan needs {steps} modes (guided, estimated, conditional), guided first and one estimated at least; got {chosen}."
        )
    if "guided" in chosen[chosen.index("conditional") :] if "conditional" in chosen else False:
        raise ValueError(f"plan: no step may be guided after a conditional one, whose unconditional prediction is unknown; got {chosen}.")
    gram = Gram(steps)
    with apply(pipe, Trajectories(scale, gram.add)):
        for start in range(0, len(prompts), batch):
            texts = list(prompts[start : start + batch])
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
            negative = {"negative_prompt": [negative_prompt] * len(texts)} if negative_prompt else {}
            pipe(texts, num_inference_steps=steps, generator=generators, output_type="latent", **negative, **call)
            progress(len(texts))
    coefficients, r2, gain = solve(gram.products, gram.sums, gram.size, chosen, ridge)
    return LinearPolicy(identity_of(pipe, steps, scale, gram.shape, negative_prompt), chosen, coefficients, r2, gain, gram.trajectories)
