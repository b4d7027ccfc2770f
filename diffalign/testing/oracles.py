"""Exact answers for guidance: two Gaussians whose denoiser is a formula, and a sampling loop short
enough to be read.

The loop asks a technique for passes, evaluates exactly those rows, combines, and hands the result
to a real diffusers scheduler. It knows nothing of pipelines, so a test that uses it depends on the
technique and the scheduler only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch

from diffalign.core import Context, Pass, Space, StepInfo, Tensor, linear_mix
from diffalign.core.types import Mix

Kind = Literal["eps", "v", "x0", "flow"]


class Model(Protocol):
    """``model(x [B, ...], sigma, kind, request)`` -> prediction of the rows of ``request``, in the
    parametrisation ``kind``."""

    def __call__(self, x: Tensor, sigma: float, kind: Kind, request: Pass) -> Tensor: ...


def amplitudes(sigma: float, flow: bool) -> tuple[float, float]:
    """``(alpha, s)`` of ``x = alpha * x0 + s * eps``, the denoiser's input at noise level
    ``sigma``."""
    if flow:
        return 1.0 - sigma, sigma
    return 1.0 / math.sqrt(1.0 + sigma * sigma), sigma / math.sqrt(1.0 + sigma * sigma)


def express(x0: Tensor, eps: Tensor, alpha: float, s: float, kind: Kind) -> Tensor:
    """A clean image and its noise as the quantity ``kind`` that a network predicts."""
    return {"eps": eps, "x0": x0, "v": alpha * eps - s * x0, "flow": eps - x0}[kind]


def decompose(
    value: Tensor, x: Tensor, alpha: float, s: float, kind: Kind
) -> tuple[Tensor, Tensor]:
    """``(x0, eps)`` from a prediction ``value`` of the quantity ``kind`` at input ``x``; what is
    divided by must not be 0."""
    if kind == "eps":
        return (x - s * value) / alpha, value
    if kind == "x0":
        return value, (x - alpha * value) / s
    if kind == "v":
        return alpha * x - s * value, s * x + alpha * value
    return x - s * value, x + alpha * value


@dataclass(frozen=True, slots=True)
class TwoGaussians:
    """Images are ``N(mean_cond, std^2)`` with the prompt and ``N(mean_uncond, std^2)`` without: the
    denoiser is exact, in float64.

    ``mean_cond``, ``mean_uncond``: ``[B, ...]``, one mean per row. A pass that is made worse, by
    skipped blocks, changed attention or a weaker denoiser, sees a wider Gaussian (25% for each).
    """

    mean_cond: Tensor
    mean_uncond: Tensor
    std: float = 0.5

    def __call__(self, x: Tensor, sigma: float, kind: Kind, request: Pass) -> Tensor:
        rows = list(range(len(x)) if request.rows is None else request.rows)
        mean = (self.mean_cond if request.conditioned else self.mean_uncond).double()[rows]
        noisy = x.double()[rows]
        alpha, s = amplitudes(sigma, kind == "flow")
        changes = sum(part is not None for part in (request.attention, request.module))
        variance = (self.std * (1.0 + 0.25 * (len(request.blocks or ()) + changes))) ** 2
        x0 = mean + alpha * variance / (alpha * alpha * variance + s * s) * (noisy - alpha * mean)
        eps = (noisy - alpha * x0) / s
        return express(x0, eps, alpha, s, kind).to(x.dtype)

    def select(self, rows: Sequence[int]) -> TwoGaussians:
        """The model of those images."""
        return TwoGaussians(self.mean_cond[list(rows)], self.mean_uncond[list(rows)], self.std)

    def endpoint(self, start: Tensor, sigma: float, weight: float) -> Tensor:
        """Where the probability-flow ODE takes ``start = x0 + sigma * eps`` when guidance has the
        effective ``weight`` (float64).

        With ``g(sigma)^2 = std^2 + sigma^2`` the ODE is linear and ends at ``mean_uncond + std / g
        * (start - mean_uncond) + weight * (1 - std / g) * (mean_cond - mean_uncond)``.
        """
        shrink = self.std / math.hypot(self.std, sigma)
        low, high = self.mean_uncond.double(), self.mean_cond.double()
        return low + shrink * (start.double() - low) + weight * (1.0 - shrink) * (high - low)

    def band_weight(self, scale: float, lo: float, hi: float, sigma_max: float) -> float:
        """Effective weight when ``scale`` acts for noise levels in (lo, hi) and the conditional
        model elsewhere."""
        inside = self.std / math.hypot(self.std, lo) - self.std / math.hypot(self.std, hi)
        return 1.0 + (scale - 1.0) * inside / (1.0 - self.std / math.hypot(self.std, sigma_max))


@dataclass(slots=True)
class Trace:
    """What ``run`` did: ``sample`` is the end, or the latents before call ``stop``, ``rows`` the
    denoiser rows in all.

    ``rows_per_call``, ``passes``, ``steps``, ``guided``: one entry per call. ``state``,
    ``technique``: at the end, with options resolved.
    """

    sample: Tensor
    state: Any
    technique: Any
    rows_per_call: list[int] = field(default_factory=list)
    passes: list[tuple[Pass, ...]] = field(default_factory=list)
    steps: list[StepInfo] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(self.rows_per_call)


def kind_of(scheduler: Any) -> Kind:
    """The parametrisation a diffusers scheduler expects."""
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    kinds: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    return kinds[scheduler.config.prediction_type]


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """``(sigma, sigma_next)`` of every scheduler step, after ``set_timesteps``."""
    table = getattr(scheduler, "sigmas", None)
    if table is not None:
        values = [float(v) for v in table]
        return list(pairwise(values))
    bars = [float(v) for v in scheduler.alphas_cumprod]
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    levels = []
    for t in (int(v) for v in scheduler.timesteps):
        after = bars[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        levels.append((math.sqrt((1 - bars[t]) / bars[t]), math.sqrt((1 - after) / after)))
    return levels


def run(
    guidance: Any,
    model: Model,
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int = 10,
    sigmas: Sequence[float] | None = None,
    scale: float = 1.0,
    mix: Mix = linear_mix,
    start: int = 0,
    stop: int | None = None,
    state: Any = None,
    seed: int = 0,
) -> Trace:
    """Sample ``noise [B, ...]`` (of unit scale) under ``guidance`` with exact rows and a real
    scheduler.

    ``sigmas``: noise levels instead of ``steps``, for schedulers that take them (Euler's list ends
    with 0, flow matching's does not). ``scale``: what the pipeline would have asked for. ``mix``:
    the pipeline's arithmetic. ``seed``: of the noise that ancestral schedulers add. ``start``,
    ``stop``, ``state``: a part of the calls; ``noise`` is then the latents at ``start``.
    Predictions have the dtype of ``noise``. Raises AssertionError when ``combine`` changes its
    arguments, or the shape or dtype of a prediction.
    """
    if sigmas is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas))
    kind, timesteps = kind_of(scheduler), list(scheduler.timesteps)
    context = _context(scheduler, scale)
    technique = guidance.resolve(context)
    x = noise if start else noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "set_begin_index"):
        # counting beats searching: two levels may share a timestep
        scheduler.set_begin_index(start)
    trace = Trace(x, technique.init(len(noise)) if state is None else state, technique)
    levels = noise_levels(scheduler)
    rng = torch.Generator().manual_seed(seed)
    for call in range(start, len(timesteps) if stop is None else stop):
        t, (sigma, sigma_next) = timesteps[call], levels[call]
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        convert = _converter(inputs, sigma, kind)
        index, stage = divmod(call, context.order)
        step = StepInfo(index, context.steps, sigma, sigma_next, float(t), stage, mix, convert)
        passes = technique.passes(step, trace.state)
        preds = {p: model(inputs, sigma, kind, p) for p in passes}
        trace.rows_per_call.append(sum(len(v) for v in preds.values()))
        guided, trace.state = _combine(technique, preds, step, trace.state)
        trace.passes.append(passes)
        trace.steps.append(step)
        trace.guided.append(guided)
        extra = {"generator": rng} if "Ancestral" in type(scheduler).__name__ else {}
        x = scheduler.step(guided, t, x, **extra).prev_sample
    trace.sample = x
    return trace


def _context(scheduler: Any, scale: float) -> Context:
    """The run, as a technique hears of it, after ``set_timesteps``."""
    order = int(getattr(scheduler, "order", 1))
    return Context(
        pipeline="TwoGaussians",
        family="oracle",
        denoiser="model",
        scheduler=type(scheduler).__name__,
        scale=scale,
        scale_source="call",
        steps=-(-len(scheduler.timesteps) // order),
        flow=kind_of(scheduler) == "flow",
        order=order,
    )


def _converter(x: Tensor, sigma: float, kind: Kind) -> Callable[..., Tensor]:
    """``StepInfo.convert`` in the precision of the prediction, at least float32."""
    alpha, s = amplitudes(sigma, kind == "flow")

    def convert(
        value: Tensor, source: Space, target: Space, rows: Sequence[int] | None = None
    ) -> Tensor:
        if source == target:
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        inputs = (x if rows is None else x[list(rows)])[tuple(slice(0, n) for n in value.shape)].to(
            wide
        )
        quantities: dict[Space, Kind] = {"native": kind, "eps": "eps", "x0": "x0"}
        x0, eps = decompose(value.to(wide), inputs, alpha, s, quantities[source])
        return express(x0, eps, alpha, s, quantities[target])

    return convert


def _combine(
    technique: Any, preds: dict[Pass, Tensor], step: StepInfo, state: Any
) -> tuple[Tensor, Any]:
    """``combine`` in the technique's own space and back; a prediction that it returns untouched is
    not converted twice."""
    target = technique.combine_space
    inputs = {p: step.convert(v, "native", target, p.rows) for p, v in preds.items()}
    before = {p: v.clone() for p, v in inputs.items()}
    guided, after = technique.combine(inputs, step, state)
    for p, value in inputs.items():
        assert torch.equal(value, before[p]), f"combine changed its argument {p.name!r}"
        if guided is value:
            return preds[p], after
    native, converted = next(iter(preds.values())), next(iter(inputs.values()))
    assert guided.shape[1:] == native.shape[1:], (
        f"combine returned {list(guided.shape)} for predictions of {list(native.shape)}"
    )
    assert guided.dtype == converted.dtype, f"combine turned {converted.dtype} into {guided.dtype}"
    return step.convert(guided, target, "native").to(native.dtype), after
