"""Parametrisations: what the network predicts, and how to read it as noise or as a clean image.

``x`` is the denoiser's input in its own scaling, ``x = alpha * x0 + s * eps``. Flow models have
``alpha = 1 - sigma`` and ``s = sigma``; all others ``alpha = 1 / r`` and ``s = sigma / r`` with
``r = sqrt(sigma^2 + d^2)``, where d is 1, or EDM's ``sigma_data``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.core import COND, Guidance, Pass, Space, StepInfo, UnsupportedModel
from diffalign.families.family import Family
from diffalign.seams.swap import original_class

Kind = Literal["eps", "v", "x0", "flow", "edm"]
NAMED: dict[str, Kind] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
# parts of names of schedulers for flow models
FLOWS = ("FlowMatch", "AncestralRF")
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Parametrisation:
    """What a network predicts with its scheduler: the one place that knows how to convert it."""

    kind: Kind
    # -1 where the network predicts the negated quantity
    sign: int = 1
    # d above; EDM's ``sigma_data``
    data: float = 1.0

    @property
    def flow(self) -> bool:
        """Whether noise levels are in [0, 1]."""
        return self.kind == "flow"

    def levels(self, sigma: float) -> tuple[float, float]:
        """``(alpha, s)`` at a noise level."""
        if self.flow:
            return 1.0 - sigma, sigma
        r = math.sqrt(sigma * sigma + self.data * self.data)
        return 1.0 / r, sigma / r

    def convert(
        self, prediction: Tensor, x: Tensor, sigma: float, source: Space, target: Space
    ) -> Tensor:
        """``prediction`` [B, ...] in the space ``source`` as ``target``, in float32 or wider.

        Variance channels beyond the latent's are dropped; ``x`` may carry more channels or tokens
        (image conditions), which are ignored.
        """
        if source == target:
            return prediction
        common = tuple(slice(0, min(a, b)) for a, b in zip(prediction.shape, x.shape))
        value, x = wide(prediction[common]), wide(x[common])
        if source == "native":
            x0, eps = self._read(self.sign * value, x, sigma)
        else:
            alpha, s = self.levels(sigma)
            x0 = value if source == "x0" else (x - s * value) / max(alpha, TINY)
            eps = value if source == "eps" else (x - alpha * value) / max(s, TINY)
        if target == "native":
            return self.sign * self._written(x0, eps, x, sigma)
        return x0 if target == "x0" else eps

    def read(self, prediction: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """What ``convert`` makes of a native prediction as "x0" and as "eps"."""
        common = tuple(slice(0, min(a, b)) for a, b in zip(prediction.shape, x.shape))
        return self._read(self.sign * wide(prediction[common]), wide(x[common]), sigma)

    def _read(self, value: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """A prediction as clean image and noise."""
        alpha, s = self.levels(sigma)
        if self.kind == "eps":
            return (x - s * value) / alpha, value
        if self.kind == "v":
            return alpha * x - s * value, alpha * value + s * x
        if self.kind == "flow":
            return x - s * value, x + (1.0 - s) * value
        x0 = value if self.kind == "x0" else self.data * (self.data * alpha * x + s * value)
        return x0, (x - alpha * x0) / max(s, TINY)

    def _written(self, x0: Tensor, eps: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Clean image and noise as the network's own quantity."""
        alpha, s = self.levels(sigma)
        if self.kind == "edm":
            return (x0 / self.data - self.data * alpha * x) / max(s, TINY)
        return {"eps": eps, "v": alpha * eps - s * x0, "x0": x0, "flow": eps - x0}[self.kind]


def wide(value: Tensor) -> Tensor:
    """``value`` in float32, or in float64 where it is that already."""
    return value if value.dtype == torch.float64 else value.float()


def parametrisation_of(family: Family, scheduler: Any) -> Parametrisation:
    """What the family's network predicts with this scheduler.

    Raises: ``UnsupportedModel`` for a scheduler that does not say, or has no noise levels.
    """
    cls, config, sign = original_class(scheduler), scheduler.config, family.target_sign
    if family.parametrisation == "flow" or getattr(config, "use_flow_sigmas", False):
        return Parametrisation("flow", sign)
    if any(name in base.__name__ for base in cls.__mro__ for name in FLOWS):
        return Parametrisation("flow", sign)
    named = getattr(config, "prediction_type", None)
    if named not in NAMED or not (hasattr(scheduler, "alphas_cumprod") or _has_sigmas(scheduler)):
        raise UnsupportedModel(
            f"{cls.__name__} does not say what the model predicts and at which noise level "
            f"(prediction_type={named!r}); diffalign knows {', '.join(NAMED)}. Use another "
            "scheduler, such as DDIMScheduler or EulerDiscreteScheduler."
        )
    if hasattr(cls, "precondition_outputs"):  # EDM: the named type only chooses a sign
        sign = -sign if named == "v_prediction" else sign
        return Parametrisation("edm", sign, float(config.sigma_data))
    return Parametrisation(NAMED[named], sign)


def _has_sigmas(scheduler: Any) -> bool:
    return getattr(scheduler, "sigmas", None) is not None


def widen(guided: Tensor, like: Tensor) -> Tensor:
    """``guided`` in the dtype of ``like``, with the variance channels or tokens of ``like`` that a
    converted prediction lacks."""
    if guided.shape == like.shape:
        return guided.to(like.dtype)
    out = torch.clone(like)
    out[tuple(slice(0, n) for n in guided.shape)] = guided.to(like.dtype)
    return out


def combined(
    guidance: Guidance[Any], preds: Mapping[Pass, Tensor], step: StepInfo, state: Any
) -> tuple[Tensor, Any]:
    """``guidance.combine`` in the space that it names, on native predictions.

    The guided prediction is native again.
    """
    target = guidance.combine_space
    if target == "native" or not preds:
        return guidance.combine(preds, step, state)
    converted = {p: step.convert(v, "native", target, p.rows) for p, v in preds.items()}
    guided, state = guidance.combine(converted, step, state)
    untouched = next((p for p, value in converted.items() if value is guided), None)
    if untouched is not None:
        # handed back as it came: converting there and back would change its last bits
        return preds[untouched], state
    return widen(step.convert(guided, target, "native"), preds.get(COND, guided)), state
