"""Parametrisations: what the network predicts, and how to read it as noise or as a clean image.

``x`` is the denoiser's input in its own scaling: ``x = alpha * x0 + sigma * eps`` with ``alpha^2 +
sigma^2 = 1`` for variance preserving models (and for exploding ones after the scheduler's input
scaling), ``x = (1 - sigma) * x0 + sigma * eps`` for flow models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.core import COND, Pass, Space, StepInfo, UnsupportedModel
from diffalign.families.family import Family

Kind = Literal["eps", "v", "x0", "flow"]


def kind_of(scheduler: Any) -> Kind:
    """The parametrisation that the scheduler's configuration names; flow-matching schedulers name
    none."""
    known: dict[str, Kind] = {
        "epsilon": "eps",
        "v_prediction": "v",
        "sample": "x0",
        "flow_prediction": "flow",
    }
    named = getattr(scheduler.config, "prediction_type", None)
    if "FlowMatch" in type(scheduler).__name__ or getattr(
        scheduler.config, "use_flow_sigmas", False
    ):
        return "flow"
    if named not in known:
        raise UnsupportedModel(
            f"{type(scheduler).__name__} has prediction_type {named!r}; diffalign knows "
            f"{', '.join(known)}."
        )
    return known[named]


def parametrisation_of(family: Family, scheduler: Any) -> Kind:
    """What the family's network predicts with this scheduler."""
    return "flow" if family.parametrisation == "flow" else kind_of(scheduler)


def convert(
    prediction: Tensor, x: Tensor, sigma: float, kind: Kind, sign: int, source: Space, target: Space
) -> Tensor:
    """``prediction`` in ``source`` space as ``target``, in float32. "native" is ``sign`` times the
    ``kind``'s own quantity.

    Variance channels beyond the latent's are dropped; ``x`` may carry more channels or tokens
    (image conditions), which are ignored.
    """
    if source == target:
        return prediction
    common = tuple(slice(0, min(a, b)) for a, b in zip(prediction.shape, x.shape))
    value, x = prediction[common].float(), x[common].float()
    if kind == "flow":
        alpha, s = 1.0 - sigma, sigma
    else:
        alpha, s = 1.0 / math.sqrt(1.0 + sigma * sigma), sigma / math.sqrt(1.0 + sigma * sigma)
    # every space through x0 and eps of the same x
    if source == "native":
        value = sign * value
        if kind == "eps":
            x0, eps = (x - s * value) / alpha, value
        elif kind == "v":
            x0, eps = alpha * x - s * value, alpha * value + s * x
        elif kind == "x0":
            x0, eps = value, (x - alpha * value) / max(s, 1e-12)
        else:
            x0, eps = x - s * value, x + (1.0 - s) * value
    elif source == "eps":
        x0, eps = (x - s * value) / max(alpha, 1e-12), value
    else:
        x0, eps = value, (x - alpha * value) / max(s, 1e-12)
    if target != "native":
        return x0 if target == "x0" else eps
    native = {"eps": eps, "v": alpha * eps - s * x0, "x0": x0, "flow": eps - x0}[kind]
    return sign * native


def widen(guided: Tensor, like: Tensor) -> Tensor:
    """``guided`` in the dtype of ``like``, with the variance channels or tokens of ``like`` that a
    converted prediction lacks."""
    if guided.shape == like.shape:
        return guided.to(like.dtype)
    out = torch.clone(like)
    out[tuple(slice(0, n) for n in guided.shape)] = guided.to(like.dtype)
    return out


def combined(
    guidance: Any, preds: Mapping[Pass, Tensor], step: StepInfo, state: Any
) -> tuple[Tensor, Any]:
    """``guidance.combine`` in the space that it names, from native predictions and back to a native
    one."""
    target = guidance.combine_space
    if target == "native" or not preds:
        made: tuple[Tensor, Any] = guidance.combine(preds, step, state)
        return made
    given = {p: step.convert(v, "native", target, p.rows) for p, v in preds.items()}
    guided, state = guidance.combine(given, step, state)
    untouched = next((p for p, value in given.items() if value is guided), None)
    if (
        untouched is not None
    ):  # handed back as it came: converting there and back would change its last bits
        return preds[untouched], state
    return widen(step.convert(guided, target, "native"), preds.get(COND, guided)), state
