"""LinearAG: some unconditional predictions are estimated from earlier ones (Castillo et al. 2023,
arXiv:2312.12487, section 5.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, UnsupportedModel
from diffalign.core.checks import check_scale
from diffalign.core.identity import model_hash
from diffalign.guidance.base import Guidance
from diffalign.guidance.linear_policy import Identity, LinearPolicy, policy_at, shipped


@dataclass(frozen=True, slots=True)
class LinearState:
    """Noise predictions of the steps so far, float32: ``cond``, and ``uncond`` where a step
    evaluated or estimated it."""

    cond: tuple[Tensor, ...] = ()
    uncond: tuple[Tensor, ...] = ()

    def select(self, rows: Sequence[int]) -> LinearState:
        """The state of those images."""
        picked = list(rows)
        return LinearState(
            tuple(v[picked] for v in self.cond), tuple(v[picked] for v in self.uncond)
        )


@dataclass(frozen=True, slots=True)
class LinearAG(Guidance[LinearState]):
    """CFG at the plan's guided steps; at estimated steps the unconditional prediction is a fitted
    linear combination of earlier ones.

    Castillo et al. 2023, arXiv:2312.12487: e_n(i) ~ sum_j b_c(i,j) e_c(j) + sum_j<i b_n(i,j)
    e_n(j), noise predictions of the same image. ``policy``: path or name of a policy that
    ``diffalign fit linear-ag`` wrote; None looks for a shipped one that fits. It belongs to one
    model, scheduler, number of steps, scale, resolution and negative prompt; anything else is
    refused. ``scale`` None takes the policy's.
    Cost: 2 passes at guided steps, 1 elsewhere: 25 instead of 40 evaluations for 20 steps; memory:
    every earlier prediction.
    Differs from the paper: the regressors' exact index set is not published; ours is all of
    e_c(0..i) and e_n(0..i-1), with estimates standing in for e_n where nothing else exists, and the
    fit knows that.
    """

    scale: float | None = None
    _: dataclasses.KW_ONLY
    policy: str | None = None

    def __post_init__(self) -> None:
        check_scale("LinearAG", self.scale)
        if self.policy is not None and (not isinstance(self.policy, str) or not self.policy):
            raise ValueError(
                "LinearAG(policy=...) must be the path or name of a fitted policy, or None; got "
                f"{self.policy!r}."
            )

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        if context.order != 1:
            raise UnsupportedModel(
                f"LinearAG needs one evaluation per step; {context.scheduler} takes "
                f"{context.order}."
            )
        model = model_hash(context.module) if context.module is not None else None
        if self.policy is not None:
            fitted = policy_at(self.policy).identity
            fitted.check(
                self._found(context, model, fitted), f"The LinearAG policy {self.policy!r}"
            )
            return dataclasses.replace(self, scale=fitted.scale), {"scale": "the policy"}
        for name, policy in shipped().items():
            if policy.identity == self._found(context, model, policy.identity):
                return dataclasses.replace(self, scale=policy.identity.scale, policy=name), {
                    "scale": "the policy",
                    "policy": "shipped",
                }
        raise UnsupportedModel(
            f"LinearAG: no shipped policy ({', '.join(shipped())}) fits {context.pipeline} with "
            f"these weights, {context.scheduler}, "
            f"{context.steps} steps, scale "
            f"{context.scale if self.scale is None else self.scale:g} and negative prompt "
            f"{context.negative_prompt or ''!r}. Fit one: diffalign fit linear-ag, then "
            "LinearAG(policy=PATH)."
        )

    def _found(self, context: Context, model: str | None, fitted: Identity) -> Identity:
        """The identity of a run; ``fitted``'s where nothing is asked for or known yet (the shape is
        checked at the first step)."""
        asked = (
            context.scale if self.scale is None and context.scale_source == "call" else self.scale
        )
        return dataclasses.replace(
            fitted,
            model=model or fitted.model,
            scheduler=context.scheduler,
            steps=context.steps,
            scale=fitted.scale if asked is None or math.isclose(asked, fitted.scale) else asked,
            negative_prompt=context.negative_prompt or "",
        )

    def _policy(self) -> LinearPolicy:
        assert self.policy is not None, "resolved before the first step"
        return policy_at(self.policy)

    def init(self, batch: int) -> LinearState:
        return LinearState()

    def passes(self, step: StepInfo, state: LinearState) -> tuple[Pass, ...]:
        return (COND, UNCOND) if self._policy().plan[step.index] == "guided" else (COND,)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        policy, cond = self._policy(), preds[COND]
        i, scale = step.index, self.scale if self.scale is not None else policy.identity.scale
        mode = policy.plan[i]
        if mode == "conditional":
            return cond, state
        eps = step.convert(cond, "native", "eps").float()
        if i == 0 and tuple(eps.shape[1:]) != policy.identity.shape:
            policy.identity.check(
                dataclasses.replace(policy.identity, shape=tuple(eps.shape[1:])),
                f"The LinearAG policy {self.policy!r}",
            )
        history = (*state.cond, eps)
        if mode == "guided":
            uncond = preds[UNCOND]
            return step.mix(cond, uncond, scale), LinearState(
                history, (*state.uncond, step.convert(uncond, "native", "eps").float())
            )
        estimate = torch.einsum(
            "k,k...->...", policy.coefficients[i].to(eps), torch.stack((*history, *state.uncond))
        )
        native = step.convert(estimate, "eps", "native").to(cond.dtype)
        like = (
            native
            if native.shape == cond.shape
            else torch.cat([native, cond[:, native.shape[1] :]], dim=1)
        )
        return step.mix(cond, like, scale), LinearState(history, (*state.uncond, estimate))


@dataclass(frozen=True, slots=True)
class Trajectories(Guidance[LinearState]):
    """Plain CFG that hands every trajectory's predictions to ``sink(cond [B, S, n], uncond [B, S,
    n], shape)`` at its last step."""

    scale: float | None
    sink: Any

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        made, sources = Guidance.resolve(self, context)
        if context.order != 1:
            raise UnsupportedModel(
                f"LinearAG needs one evaluation per step; {context.scheduler} takes "
                f"{context.order}."
            )
        if made.scale == 1.0:
            raise UnsupportedModel(
                f"LinearAG has nothing to fit: {context.pipeline} runs without guidance here. "
                "Give a scale above 1."
            )
        if context.steps < 4:
            raise UnsupportedModel(
                f"LinearAG has nothing to estimate in {context.steps} steps; give at least 4."
            )
        return made, sources

    def init(self, batch: int) -> LinearState:
        return LinearState()

    def passes(self, step: StepInfo, state: LinearState) -> tuple[Pass, ...]:
        return (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        pair = [step.convert(preds[p], "native", "eps").float() for p in (COND, UNCOND)]
        state = LinearState((*state.cond, pair[0]), (*state.uncond, pair[1]))
        if step.index == step.count - 1:
            self.sink(
                *(torch.stack(values, 1).flatten(2) for values in (state.cond, state.uncond)),
                tuple(pair[0].shape[1:]),
            )
        assert self.scale is not None
        return step.mix(preds[COND], preds[UNCOND], self.scale), state


def identity_of(
    pipe: Any, steps: int, scale: float, shape: tuple[int, ...], negative_prompt: str
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
