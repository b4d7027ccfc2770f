"""LinearAG: some unconditional predictions are estimated from earlier ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import torch

from diffalign.core import (
    CALL,
    CFG_PASSES,
    COND,
    UNCOND,
    Context,
    Guidance,
    Pass,
    StepInfo,
    Tensor,
    TwoBranches,
    UnsupportedModel,
    auto,
    filled,
    option,
)
from diffalign.core.identity import model_hash
from diffalign.core.types import Pipeline
from diffalign.guidance.linear_policy import Identity, policy_at, shipped


@dataclass(frozen=True, slots=True)
class LinearState:
    """Noise predictions of the steps so far, [B, ...] in float32."""

    cond: tuple[Tensor, ...] = ()
    # where a step evaluated or estimated it
    uncond: tuple[Tensor, ...] = ()

    def select(self, rows: Sequence[int]) -> LinearState:
        """The state of those images."""
        images = list(rows)
        return LinearState(
            tuple(v[images] for v in self.cond), tuple(v[images] for v in self.uncond)
        )


@dataclass(frozen=True, slots=True)
class LinearAG(Guidance[LinearState]):
    """Guides by CFG at the plan's guided steps; at estimated steps the unconditional prediction is
    a fitted linear combination of earlier ones.

    Castillo et al. 2023, arXiv:2312.12487, section 5.2: e_n(i) ~ sum_j b_c(i,j) e_c(j) + sum_j<i
    b_n(i,j) e_n(j), noise predictions of the same image. A policy belongs to one model, scheduler,
    number of steps, scale, resolution and negative prompt.
    Differs from the paper: the regressors' exact index set is not published; ours is all of
    e_c(0..i) and e_n(0..i-1), with estimates standing in for e_n where nothing else exists, and the
    fit knows that.
    Cost: 2 passes at guided steps, 1 elsewhere: 25 instead of 40 evaluations for 20 steps; memory:
    every earlier prediction.
    Raises: ``UnsupportedModel`` for anything else than what the policy was fitted on.
    """

    scale: float = auto(CALL, "the policy's; another is refused", usual=(1.0, 15.0))
    _: KW_ONLY
    policy: str = auto(
        "shipped policies", "path or name of what diffalign fit linear-ag wrote", nonempty=True
    )

    def resolve(self, context: Context) -> Self:
        _check_order(context)
        model = model_hash(context.module) if context.module is not None else None
        if self.policy is not None:
            fitted = policy_at(self.policy).identity
            here = self._identity(context, model, fitted)
            fitted.check(here, f"The LinearAG policy {self.policy!r}")
            context.sources["scale"] = "the policy"
            return dataclasses.replace(self, scale=fitted.scale)
        for name, policy in shipped().items():
            if policy.identity == self._identity(context, model, policy.identity):
                context.sources.update(scale="the policy", policy="shipped")
                return dataclasses.replace(self, scale=policy.identity.scale, policy=name)
        raise UnsupportedModel(
            f"LinearAG: no shipped policy ({', '.join(shipped())}) fits {context.pipeline} with "
            f"these weights, {context.scheduler}, "
            f"{context.steps} steps, scale "
            f"{context.scale if self.scale is None else self.scale:g} and negative prompt "
            f"{context.negative_prompt or ''!r}. Fit one: diffalign fit linear-ag, then "
            "LinearAG(policy=PATH)."
        )

    def _identity(self, context: Context, model: str | None, fitted: Identity) -> Identity:
        """The identity of a run; ``fitted``'s where nothing is asked for or known yet (the shape is
        checked at the first step)."""
        of_call = self.scale is None and context.scale_source == "call"
        scale = context.scale if of_call else self.scale
        return dataclasses.replace(
            fitted,
            model=model or fitted.model,
            scheduler=context.scheduler,
            steps=context.steps,
            scale=fitted.scale if scale is None or math.isclose(scale, fitted.scale) else scale,
            negative_prompt=context.negative_prompt or "",
        )

    def init(self, batch: int) -> LinearState:
        return LinearState()

    def passes(self, step: StepInfo, state: LinearState) -> tuple[Pass, ...]:
        return CFG_PASSES if policy_at(self.policy).plan[step.index] == "guided" else (COND,)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        policy, cond, i = policy_at(self.policy), preds[COND], step.index
        if policy.plan[i] == "conditional":
            return cond, state
        eps = step.convert(cond, "native", "eps").float()
        if i == 0 and tuple(eps.shape[1:]) != policy.identity.shape:
            policy.identity.check(
                dataclasses.replace(policy.identity, shape=tuple(eps.shape[1:])),
                f"The LinearAG policy {self.policy!r}",
            )
        history = (*state.cond, eps)
        if policy.plan[i] == "guided":
            uncond = preds[UNCOND]
            known = (*state.uncond, step.convert(uncond, "native", "eps").float())
            return step.mix(cond, uncond, self.scale), LinearState(history, known)
        weights, values = policy.coefficients[i].to(eps), torch.stack((*history, *state.uncond))
        estimate = torch.einsum("k,k...->...", weights, values)
        uncond = step.convert(estimate, "eps", "native").to(cond.dtype)
        if uncond.shape != cond.shape:  # the channels of a learned variance
            uncond = torch.cat([uncond, cond[:, uncond.shape[1] :]], dim=1)
        estimated = (*state.uncond, estimate)
        return step.mix(cond, uncond, self.scale), LinearState(history, estimated)


@dataclass(frozen=True, slots=True)
class Trajectories(TwoBranches[LinearState]):
    """Guides by plain CFG and hands every trajectory's predictions to ``sink`` at its last step."""

    scale: float = auto(CALL, "guidance scale")
    sink: Any = option(
        None, "called with cond [B, S, n], uncond [B, S, n] and a prediction's shape"
    )

    def resolve(self, context: Context) -> Self:
        technique = filled(self, context)
        _check_order(context)
        if technique.scale == 1.0:
            raise UnsupportedModel(
                f"LinearAG has nothing to fit: {context.pipeline} runs without guidance here. "
                "Give a scale above 1."
            )
        if context.steps < 4:
            raise UnsupportedModel(
                f"LinearAG has nothing to estimate in {context.steps} steps; give at least 4."
            )
        return technique

    def init(self, batch: int) -> LinearState:
        return LinearState()

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        eps = [step.convert(value, "native", "eps").float() for value in (cond, uncond)]
        state = LinearState((*state.cond, eps[0]), (*state.uncond, eps[1]))
        if step.index == step.count - 1:
            stacks = (torch.stack(values, 1).flatten(2) for values in (state.cond, state.uncond))
            self.sink(*stacks, tuple(eps[0].shape[1:]))
        return step.mix(cond, uncond, self.scale), state


def _check_order(context: Context) -> None:
    if context.order != 1:
        raise UnsupportedModel(
            f"LinearAG needs one evaluation per step; {context.scheduler} takes {context.order}."
        )


def identity_of(
    pipe: Pipeline, steps: int, scale: float, shape: tuple[int, ...], negative_prompt: str
) -> Identity:
    """The identity of a run of ``pipe``."""
    from diffalign.families import family_of
    from diffalign.seams.swap import original_class

    module = getattr(pipe, family_of(original_class(pipe)).denoisers[0])
    return Identity(
        model_hash(module),
        original_class(pipe.scheduler).__name__,
        steps,
        float(scale),
        shape,
        negative_prompt,
    )
