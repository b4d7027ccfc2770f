"""Differentiable calls of an unmodified pipeline: its images from noise, and rewards of x0.

The pipeline's ``__call__`` without its ``no_grad`` runs inside the session, so techniques stay
active. Only what the caller differentiates requires a gradient: the weights are frozen meanwhile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.core import State, UnsupportedModel
from diffalign.core.checks import check_choice
from diffalign.core.sampler import Clamp, Mode, generator_states
from diffalign.core.types import Pipeline
from diffalign.seams.denoiser.call import Denoise, DenoiserCall
from diffalign.seams.denoiser.tap import Generation, Start
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.guards import check_noise
from diffalign.seams.trajectory.kernels import drawing_of
from diffalign.seams.trajectory.running import advance, generator_of, history_of
from diffalign.seams.trajectory.schedule import Window

if TYPE_CHECKING:
    from diffalign.seams.trajectory.sampler import PipelineSampler


MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Rendering:
    """How ``render`` keeps what the backward pass needs."""

    grad: bool
    mode: Mode
    clamp: Clamp
    # evaluations at the end whose gradient is exact, in modes "skip" and "residual"
    exact: int

    def __post_init__(self) -> None:
        check_choice("render", "mode", self.mode, MODES)
        check_choice("render", "clamp", self.clamp, ("hard", "straight_through"))
        if self.exact < 1:
            raise ValueError(f"render(exact=...) must be at least 1; got {self.exact}.")


def render(
    sampler: PipelineSampler, noise: Tensor, rendering: Rendering, seeds: Sequence[int]
) -> Tensor:
    """The images [B, 3, H, W] in [0, 1] of start noise [B, ...]; float32 master noise is welcome.

    The values are those of ``decode(run(start(seeds, noise)))``. Modes: ``checkpoint`` keeps the
    latents of each evaluation and runs it again in the backward pass; ``plain`` keeps everything;
    ``one_step`` is ``plain`` for a trajectory of one evaluation. Two are approximate: ``skip``
    counts the prediction of all but the last ``exact`` evaluations as a constant, and the
    scheduler's own arithmetic carries the gradient past them; ``residual`` differentiates the last
    ``exact`` evaluations only and hands their gradient to the noise as it is, which never vanishes.
    ``clamp`` "straight_through" lets the gradient pass saturated pixels.
    Cost: one trajectory and its decodes; a backward pass is charged in denoiser rows when it
    begins.
    Raises: ValueError for noise of another shape or with NaN.
    """
    session = sampler.session
    _check(sampler, noise, rendering)
    check_noise(sampler.segments, noise, len(seeds))
    state = _beginning(sampler, noise, rendering, seeds)
    generators = [generator_of(rng) for rng in state.rng]
    drawing = drawing_of(sampler.kernel, sampler.grid, generators)
    window = Window(state.step, None, history_of(state), generators, drawing)
    sampler.meter.charge(decodes=len(noise))
    kept = Kept(rendering, sampler.count)
    around = kept.around if rendering.grad else None
    session.start = Start(state.step, sampler.count, dict(state.techniques or {}), around)
    undecorated = functools.partial(_undecorated(type(sampler.pipe)), sampler.pipe)
    try:
        with ExitStack() as stack:
            stack.enter_context(sampler.segments.within(window))
            stack.enter_context(torch.set_grad_enabled(rendering.grad))
            if rendering.grad:
                stack.enter_context(frozen(sampler.pipe))
            if rendering.clamp == "straight_through":
                stack.enter_context(unclamped(sampler.pipe))
            images = sampler.segments.call(state.latents, generators, "pt", undecorated)
    finally:
        session.start = None
        sampler.meter.note(evaluations=window.calls * len(noise))
    if images.requires_grad:
        hook: Any = images.register_hook  # untyped
        hook(functools.partial(_charge, sampler, kept))
    return images


def _beginning(
    sampler: PipelineSampler, noise: Tensor, rendering: Rendering, seeds: Sequence[int]
) -> State:
    """Where the differentiable part begins; its latents depend on ``noise``."""
    latents = noise.to(sampler.segments.noise)
    state = State(latents, 0, sampler.count, generator_states(seeds))
    first = sampler.count - rendering.exact
    if not rendering.grad or rendering.mode != "residual" or first < 1:
        return state
    with torch.no_grad():
        state = advance(sampler, replace(state, latents=latents.detach()), first, None)
    with torch.enable_grad():
        return replace(state, latents=state.latents + (latents - latents.detach()))


def twist(
    sampler: PipelineSampler, state: State, reward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """``reward`` [B] of the images of x0 at ``state``, and its gradient [B, ...] in the latents.

    One differentiable evaluation of the model at ``state.latents``, decoded: the twist of TDS (Wu
    et al. 2023, arXiv:2306.17775) and DAS (Kim et al. 2025, arXiv:2501.05803). ``state`` is not
    changed. A finished state is decoded as it is.
    Cost: one evaluation, one decode and one backward pass of each image; the rewards are the
    caller's to count.
    Raises: ValueError for rewards of another shape, not finite, or without a gradient.
    """
    session = sampler.session
    _check_pipeline(sampler.pipe)
    rows = sampler.meter.rows
    with torch.enable_grad(), frozen(sampler.pipe):
        latents = state.latents.detach().clone().requires_grad_()
        x0 = latents if state.finished else _predicted(sampler, state, latents, session)
        sampler.meter.charge(decodes=len(latents))
        call = functools.partial(_undecorated(original_class(sampler.pipe)), sampler.pipe)
        generators = [torch.Generator().manual_seed(0) for _ in state.rng]
        with sampler.segments.within(Window(state.count, state.count)):
            images = sampler.segments.call(x0.to(latents.dtype), generators, "pt", call)
        values = reward(images)
    if values.shape != (len(latents),) or not values.requires_grad:
        raise ValueError(
            f"twist(reward=...) must return [{len(latents)}] rewards with a gradient; got "
            f"{list(values.shape)}" + ("." if values.requires_grad else " without one.")
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"twist(reward=...) must be finite; got {values.tolist()}.")
    sampler.meter.charge(backward=sampler.meter.rows - rows)
    (gradient,) = torch.autograd.grad(values.sum(), latents)
    return values.detach(), gradient


def _predicted(sampler: PipelineSampler, state: State, latents: Tensor, session: Any) -> Tensor:
    """x0 of one evaluation at ``latents``, with its graph."""
    generators = [torch.Generator().manual_seed(0) for _ in state.rng]
    history: Any = state.scheduler
    # the latents stay where they are: only the prediction is wanted
    window = Window(state.step, state.step + 1, history, generators, lambda arrival: arrival.sample)
    session.start = Start(state.step, sampler.count, dict(state.techniques or {}))
    undecorated = functools.partial(_undecorated(type(sampler.pipe)), sampler.pipe)
    try:
        with sampler.segments.within(window):
            sampler.segments.call(latents, generators, "latent", undecorated)
    finally:
        session.start = None
        sampler.meter.note(evaluations=window.calls * len(state.rng))
    arrival = window.arrival
    assert arrival is not None
    return sampler.grid.read(arrival.output, arrival.sample, arrival.index)[0]


def _undecorated(cls: type) -> Callable[..., Any]:
    """The pipeline's call without ``torch.no_grad`` around it."""
    call = cls.__call__
    inner: Callable[..., Any] = getattr(call, "__wrapped__", call)
    return inner


class Kept:
    """What each evaluation keeps for the backward pass."""

    def __init__(self, rendering: Rendering, count: int) -> None:
        self.rendering, self.count = rendering, count
        # denoiser rows that a backward pass goes through
        self.rows = 0

    def around(self, generation: Generation) -> Callable[[Denoise], Denoise]:
        """A middleware around every evaluation of a generation, outside all techniques."""

        def wrap(inner: Denoise) -> Denoise:
            return functools.partial(self._denoise, generation, inner)

        return wrap

    def _denoise(
        self,
        generation: Generation,
        inner: Denoise,
        call: DenoiserCall,
        arguments: dict[str, Any],
    ) -> Any:
        mode = self.rendering.mode
        last = self.count - self.rendering.exact
        if mode == "skip" and generation.clock.calls < last:
            with torch.no_grad():
                return inner(call, arguments)
        self.rows += len(call.conditioned)
        if mode in ("plain", "one_step"):
            return inner(call, arguments)
        module, states = getattr(generation.pipe, call.denoiser), dict(generation.states)
        runs = itertools.count()

        def run(values: dict[str, Any]) -> Any:
            if not next(runs):
                return inner(call, values)
            # in the backward pass, perhaps in another thread and after the session
            after, generation.states = generation.states, dict(states)
            try:
                with frozen(module):
                    return inner(call, values)
            finally:
                generation.states = after

        return checkpoint(run, arguments, use_reentrant=False)


def _charge(sampler: PipelineSampler, kept: Kept, gradient: Tensor) -> None:
    """The backward pass begins: it is counted before it is done."""
    sampler.meter.charge(backward=kept.rows)


@contextmanager
def frozen(owner: Any) -> Iterator[None]:
    """Within the block no weight of a module or a pipeline requires a gradient."""
    parts = [owner] if isinstance(owner, nn.Module) else list(owner.components.values())
    modules = [part for part in parts if isinstance(part, nn.Module)]
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


class _Clamp(torch.autograd.Function):
    """Clamped to [0, 1]; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def _denormalised(images: Tensor) -> Tensor:
    result: Tensor = _Clamp.apply(images * 0.5 + 0.5)
    return result


@contextmanager
def unclamped(pipe: Pipeline) -> Iterator[None]:
    """Within the block saturated pixels of decoded images pass their gradient on."""
    names = ("image_processor", "video_processor")
    owners = [pipe.__dict__[name] for name in names if name in pipe.__dict__]
    for owner in owners:
        owner.__dict__["denormalize"] = _denormalised
    try:
        yield
    finally:
        for owner in owners:
            del owner.__dict__["denormalize"]


def _check(sampler: PipelineSampler, noise: Tensor, rendering: Rendering) -> None:
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("render(noise=...) must be finite; it holds NaN or infinity.")
    if rendering.grad:
        _check_pipeline(sampler.pipe)
    if rendering.grad and rendering.mode == "one_step" and sampler.count != 1:
        raise ValueError(
            f"render(mode='one_step') is for one evaluation; this call has {sampler.count}. Use "
            "mode='checkpoint'."
        )


def _check_pipeline(pipe: Pipeline) -> None:
    for name in ("safety_checker", "watermark"):
        if getattr(pipe, name, None) is not None:
            raise UnsupportedModel(
                f"The {name.replace('_', ' ')} of {original_class(pipe).__name__} leaves no "
                f"gradient; set pipe.{name} = None for a differentiable call."
            )
