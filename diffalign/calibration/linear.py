"""Fit LinearAG policies: run plain CFG, stream inner products, solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.core.types import Pipeline
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.guidance.linear_ag import Trajectories, identity_of
from diffalign.guidance.linear_policy import LinearPolicy, Mode, check_plan, default_plan


class Gram:
    """Inner products of every pair of predictions, streamed in float64: memory (2S)^2, whatever the
    number of trajectories."""

    def __init__(self) -> None:
        self.products, self.sums = (
            torch.zeros(0, 0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.float64),
        )
        self.steps = self.size = self.trajectories = 0
        self.shape: tuple[int, ...] = ()

    def add(self, cond: Tensor, uncond: Tensor, shape: tuple[int, ...]) -> None:
        """``cond``, ``uncond`` [B, S, n]: the noise predictions of B images, each of ``shape``."""
        if not self.steps:
            self.steps, self.shape = cond.shape[1], shape
            self.products, self.sums = (
                self.products.new_zeros(2 * self.steps, 2 * self.steps),
                self.sums.new_zeros(2 * self.steps),
            )
        for row in torch.cat([cond, uncond], dim=1).cpu().double():
            self.products += row @ row.T
            self.sums += row.sum(1)
        self.size += cond.shape[0] * cond.shape[2]
        self.trajectories += cond.shape[0]


def solve(
    gram: Tensor, sums: Tensor, size: int, plan: Sequence[Mode], ridge: float = 1e-6
) -> tuple[dict[int, Tensor], dict[int, float], dict[int, float]]:
    """Least squares for every estimated step, from inner products alone.

    ``gram`` [2S, 2S] float64: of e_c(0..S-1), e_n(0..S-1) summed over trajectories and values;
    ``sums`` [2S]: their sums; ``size``: values summed. Earlier estimates stand in for e_n where the
    plan will have nothing else. ``ridge``: relative to the mean diagonal (the columns are nearly
    parallel). Returns coefficients, r2 and gain per estimated step.
    """
    steps = len(plan)
    # the e_n that sampling will hold, as combinations of the true vectors
    history = torch.zeros(steps, 2 * steps, dtype=torch.float64)
    coefficients: dict[int, Tensor] = {}
    r2: dict[int, float] = {}
    gain: dict[int, float] = {}
    unit = torch.eye(2 * steps, dtype=torch.float64)
    for i, mode in enumerate(plan):
        history[i] = unit[steps + i]
        if mode != "estimated":
            continue
        features = torch.cat([unit[: i + 1], history[:i]])
        a, target = features @ gram @ features.T, unit[steps + i]
        b = features @ gram @ target
        weights = torch.linalg.solve(
            a + ridge * a.diagonal().mean() * torch.eye(len(a), dtype=torch.float64), b
        )
        residual = target - weights @ features
        error = float(residual @ gram @ residual)
        variance = float(gram[steps + i, steps + i] - sums[steps + i] ** 2 / size)
        away = unit[steps + i] - unit[i]
        coefficients[i], r2[i], gain[i] = (
            weights,
            1.0 - error / variance,
            1.0 - error / float(away @ gram @ away),
        )
        history[i] = weights @ features
    return coefficients, r2, gain


def fit_linear_ag(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int = 20,
    negative_prompt: str = "",
    plan: Sequence[Mode] | None = None,
    batch: int = 16,
    seed: int = 0,
    ridge: float = 1e-6,
    step: Callable[[], None] | None = None,
    **call: object,
) -> LinearPolicy:
    """One trajectory of plain CFG per prompt on ``pipe`` as it is, then one least-squares problem
    per estimated step.

    ``scale``: guidance scale, 1 = off. ``seed``: base of the seeds. ``step``: called after each
    step. ``call``: further arguments of the pipeline (size, ...). The paper used 200 trajectories.
    Cost: ``2 * steps * len(prompts)`` denoiser rows; the solve takes milliseconds.
    Raises ValueError for a plan that does not fit, and whatever ``apply`` raises for the pipeline.
    """
    if plan is not None:
        check_plan(plan, steps)
    gram = Gram()
    call |= {"num_inference_steps": steps, "output_type": "latent"}
    call |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    techniques = (Trajectories(scale, gram.add),)
    for _ in samples(
        pipe, techniques, jobs_of(prompts, base=seed), batch=batch, call=call, step=step
    ):
        pass
    # PNDM makes one step more than it is asked for
    modes = tuple(plan) if plan is not None else default_plan(gram.steps)
    check_plan(modes, gram.steps)
    coefficients, r2, gain = solve(gram.products, gram.sums, gram.size, modes, ridge)
    identity = identity_of(pipe, steps, scale, gram.shape, negative_prompt)
    return LinearPolicy(identity, modes, coefficients, r2, gain, gram.trajectories)
