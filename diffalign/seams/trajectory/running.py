"""One segment of a trajectory, and the forward process back up it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.core import State
from diffalign.seams.denoiser.tap import Start
from diffalign.seams.trajectory.grid import row_noise
from diffalign.seams.trajectory.guards import check_children, check_run, check_seeds
from diffalign.seams.trajectory.kernels import drawing_of, why_alike
from diffalign.seams.trajectory.schedule import Snapshot, Window

if TYPE_CHECKING:
    from diffalign.seams.trajectory.sampler import PipelineSampler


def advance(
    sampler: PipelineSampler, state: State, until: int | None, drift: Tensor | None
) -> State:
    """``PipelineSampler.run``: one call of the pipeline for the steps from ``state`` on."""
    session = sampler.session
    check_run(sampler.segments, sampler.kernel, state, until, drift)
    generators = [generator_of(rng) for rng in state.rng]
    drawing = drawing_of(sampler.kernel, sampler.grid, generators, drift)
    window = Window(state.step, until, history_of(state), generators, drawing)
    session.start = Start(state.step, sampler.count, dict(state.techniques or {}))
    try:
        with sampler.segments.within(window):
            latents = sampler.segments.call(state.latents, generators, "latent")
            snapshot = window.snapshot(sampler.pipe.scheduler, len(latents))
    finally:
        session.start = None
        sampler.meter.note(evaluations=window.calls * len(state.rng))
    last = window.arrival
    assert last is not None
    x0 = None if drawing is None else drawing.x0
    if x0 is None:
        x0, _ = sampler.grid.read(last.output, last.sample, last.index)
    end = State(
        latents=latents,
        step=last.index + 1,
        count=sampler.count,
        rng=states_of(generators),
        scheduler=snapshot,
        techniques=session.states,
        x0=x0,
        transition=None if drawing is None else drawing.transition,
    )
    if state.reseeded:
        check_children(state, end)
    return end


def noised(sampler: PipelineSampler, state: State, to: int, seeds: Sequence[int]) -> State:
    """``PipelineSampler.renoise``: the same images at an earlier evaluation."""
    if not 0 <= to < state.step:
        raise ValueError(
            f"renoise(to={to}) must be at least 0 and below the state's step {state.step}."
        )
    check_seeds("renoise", seeds, len(seeds), len(state.rng))
    sampler.grid.check_levels("renoise")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = row_noise(generators, state.latents)
    latents = sampler.grid.noised(state.latents, state.step, to, noise)
    return State(latents, to, state.count, states_of(generators))


def redrawn(sampler: PipelineSampler, state: State, seeds: Sequence[int]) -> State:
    """``PipelineSampler.redraw``: the last step's noise drawn again, nothing evaluated."""
    check_seeds("redraw", seeds, len(seeds), len(state.rng))
    law = state.transition
    if law is None or law.std == 0.0:
        reason = why_alike(sampler.kernel, sampler.grid) or (
            "the first state and the last step have no noise of a step"
            if law is not None or state.step == 0
            else f"{sampler.grid.scheduler} does not say what it draws; pass kernel=Eta(1.0)"
        )
        raise ValueError(f"redraw needs a state whose last step drew noise: {reason}.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    mean = law.mean if law.drift is None else law.mean + law.drift.to(law.mean)
    latents = (mean + law.std * row_noise(generators, mean)).to(state.latents.dtype)
    return replace(state, latents=latents, rng=states_of(generators), reseeded=False)


def generator_of(state: Tensor) -> torch.Generator:
    """A generator that goes on from a state."""
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def states_of(generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
    """Where each generator is."""
    return tuple(generator.get_state() for generator in generators)


def history_of(state: State) -> Snapshot | None:
    """The scheduler's history in a state."""
    history = state.scheduler
    assert history is None or isinstance(history, Snapshot)
    return history
