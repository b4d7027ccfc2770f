"""What a sampler refuses to run, each in one sentence and before any compute."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.core import State, UnsupportedModel
from diffalign.seams.denoiser.cache import is_cached
from diffalign.seams.trajectory.grid import Grid
from diffalign.seams.trajectory.kernels import Kernel, Native, why_alike
from diffalign.seams.trajectory.segments import Segments


def check_run(
    segments: Segments, kernel: Kernel, state: State, until: int | None, drift: Tensor | None
) -> None:
    """Raise where a state cannot be run to ``until`` with ``drift``."""
    grid = segments.grid
    _check_place(grid, state, until)
    whole = state.step == 0 and until in (None, state.count)
    call = segments.call
    if not whole and any(map(is_cached, call.family.present(segments.pipe).values())):
        raise UnsupportedModel(
            "The model runs a feature cache, which belongs to one trajectory: it cannot be cut. "
            "Disable the cache, or run to the end."
        )
    if drift is not None and drift.shape != state.latents.shape:
        raise ValueError(
            f"run(drift=...) must be {list(state.latents.shape)}; got {list(drift.shape)}."
        )
    if drift is not None and isinstance(kernel, Native):
        raise UnsupportedModel(
            f"drift needs a kernel whose mean is known; {grid.scheduler} makes its own steps. Pass "
            "kernel=Eta(1.0), or FlowSDE() on a flow model."
        )
    reason = why_alike(kernel, grid)
    if state.reseeded and reason is not None:
        raise ValueError(reason)


def _check_place(grid: Grid, state: State, until: int | None) -> None:
    if state.count != grid.count:
        raise ValueError(
            f"run(state=...) has {state.count} evaluations, this sampler {grid.count}; use the "
            "sampler that made it."
        )
    if state.finished:
        raise ValueError(f"run(state=...) is finished: step {state.step} of {state.count}.")
    if until is not None and until <= state.step:
        raise ValueError(f"run(until={until}) must be above the state's step {state.step}.")
    if until is not None and until > state.count:
        raise ValueError(f"run(until={until}) must be at most {state.count}.")


def check_children(state: State, end: State) -> None:
    """Raise where reseeded images, each with its own generator, came out alike."""
    for i in range(len(state.rng)):
        for j in range(i):
            alike = torch.equal(end.latents[i], end.latents[j])
            if alike and not torch.equal(state.rng[i], state.rng[j]):
                raise ValueError(
                    f"Images {j} and {i} were reseeded at evaluation {state.step} of {state.count} "
                    f"and came out alike at {end.step}: no step between draws noise, as the last "
                    "one never does. Branch earlier."
                )


def check_noise(segments: Segments, noise: Tensor, images: int) -> None:
    """Raise ValueError for start noise of another shape than the pipeline's own."""
    expected = (images, *segments.noise.shape[1:])
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"noise must be {list(expected)} for {images} seeds; got {list(noise.shape)}."
        )


def check_seeds(name: str, seeds: object, count: int, images: int) -> None:
    """Raise ValueError where the seeds are not one for each image."""
    if count != images:
        raise ValueError(f"{name}(seeds=...) needs {images} seeds, one each; got {count}: {seeds}.")
