"""The noise levels of one trajectory, and what follows from them: clean latents, noise added again.

Latents are ``x = alpha * x0 + s * eps`` in the denoiser's own scaling (``denoiser/space.py``).
Schedulers of the Euler kind keep them unscaled, ``x * r`` with ``r = sqrt(sigma^2 + d^2)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel, linear_mix
from diffalign.core.types import Keywords, Scheduler
from diffalign.families.family import Family
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.rows import parameter_names
from diffalign.seams.denoiser.space import Parametrisation, parametrisation_of, wide
from diffalign.seams.swap import original_class


@dataclass(frozen=True, slots=True)
class Grid:
    """What a scheduler does with one call's number of steps; it never changes during a run."""

    # class of the scheduler
    scheduler: str
    parametrisation: Parametrisation
    # of each evaluation
    timesteps: tuple[float, ...]
    # noise level of each evaluation, in the scheduler's own terms
    sigmas: tuple[float, ...]
    # noise level that each evaluation goes to
    following: tuple[float, ...]
    # evaluations of one step
    order: int
    # whether latents are unscaled, x0 + sigma * eps
    unscaled: bool
    # what the pipeline multiplies start noise with
    initial: float
    # bound of the scheduler's own clipping of x0, None for none
    clip: float | None
    # whether the scheduler's step draws noise that its generator decides
    draws: bool

    @property
    def count(self) -> int:
        """Evaluations of one trajectory."""
        return len(self.sigmas)

    @property
    def flow(self) -> bool:
        """Whether latents are ``(1 - sigma) * x0 + sigma * eps``."""
        return self.parametrisation.flow

    def level(self, step: int) -> float:
        """The noise level of a state after ``step`` evaluations."""
        return self.sigmas[step] if step < self.count else self.following[-1]

    def radius(self, sigma: float) -> float:
        """What scaled latents are multiplied with to be the scheduler's."""
        d = self.parametrisation.data
        return math.sqrt(sigma * sigma + d * d) if self.unscaled else 1.0

    def read(self, output: Tensor, sample: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Clean latents and noise [B, ...], float32 or wider, behind one call of the scheduler.

        ``output``, ``sample``: arguments of ``scheduler.step`` at evaluation ``index``.
        """
        sigma = self.sigmas[index]
        x = sample / self.radius(sigma)
        output = output[tuple(slice(0, n) for n in x.shape)]
        x0, eps = map(wide, self.parametrisation.read(output, x, sigma))
        return (x0 if self.clip is None else x0.clamp(-self.clip, self.clip)), eps

    def check_levels(self, what: str) -> None:
        """Raise ``UnsupportedModel`` where ``what`` cannot be done with these noise levels."""
        pairs = (*zip(self.sigmas, self.following), *zip(self.sigmas, self.sigmas[1:]))
        falling = all(a > b for a, b in pairs)
        if self.order != 1 or not falling or (self.flow and max(self.sigmas) > 1.0):
            raise UnsupportedModel(
                f"{what} needs one evaluation per step and noise levels that fall at each; "
                f"{self.scheduler} does not have them here. Use DDIMScheduler, "
                "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler."
            )

    def noised(self, latents: Tensor, step: int, to: int, noise: Tensor) -> Tensor:
        """Latents after ``step`` evaluations as they are after ``to``: the forward process.

        ``x' = (a'/a) x + sqrt(s'^2 - (a'/a)^2 s^2) noise``, all [B, ...].
        """
        low, high = self.level(step), self.level(to)
        (a, s), (a_to, s_to) = self.parametrisation.levels(low), self.parametrisation.levels(high)
        ratio = a_to / a
        spread = math.sqrt(max(s_to * s_to - ratio * ratio * s * s, 0.0))
        x = ratio * (wide(latents) / self.radius(low)) + spread * noise.to(latents.device)
        x = x * self.radius(high)
        # the pipeline multiplies what it starts from
        return (x / self.initial if to == 0 else x).to(latents.dtype)


def grid_of(
    family: Family, scheduler: Scheduler, noise: Tensor, options: Keywords, multiplied: bool
) -> Grid:
    """The grid of a scheduler whose ``set_timesteps`` has run.

    ``noise``: one image's start noise. ``options``: of the call, for ``scheduler.step``.
    ``multiplied``: whether the pipeline multiplies its start noise by ``init_noise_sigma``.
    Raises: ``UnsupportedModel`` for a scheduler without noise levels.
    """
    clock = Clock(scheduler, linear_mix, float)
    clock.start(0.0, None, offset=0)
    name, count = original_class(scheduler).__name__, len(clock.timesteps)
    sigmas = list(clock.sigmas[:count])
    between = scheduler.__dict__.get("sigmas_interpol")
    if between is not None:  # the second evaluation of KDPM2 lies between two levels
        sigmas[1::2] = [float(between[i]) for i in range(1, count, 2)]
    config = scheduler.config
    clip = None
    if config.get("clip_sample", False) and not config.get("thresholding", False):
        clip = float(config.get("clip_sample_range", 1.0))
    return Grid(
        scheduler=name,
        # what reaches the scheduler has its sign, whatever the network's is
        parametrisation=replace(parametrisation_of(family, scheduler), sign=_sign(scheduler)),
        timesteps=tuple(clock.timesteps),
        sigmas=tuple(sigmas),
        following=tuple(clock.next_sigmas),
        order=clock.order,
        unscaled=_unscaled(scheduler),
        initial=float(scheduler.init_noise_sigma) if multiplied else 1.0,
        clip=clip,
        draws=_draws(scheduler, noise, options),
    )


def _sign(scheduler: Scheduler) -> int:
    edm = hasattr(original_class(scheduler), "precondition_outputs")
    return -1 if edm and scheduler.config.prediction_type == "v_prediction" else 1


def _unscaled(scheduler: Scheduler) -> bool:
    """Whether the scheduler scales what the denoiser sees."""
    if not hasattr(scheduler, "scale_model_input"):
        return False
    one = torch.ones(1, device=scheduler.__dict__["timesteps"].device)
    probe = _copy(scheduler)
    scaled = probe.scale_model_input(one, scheduler.__dict__["timesteps"][0])
    return not torch.equal(scaled, one)


def _copy(scheduler: Scheduler) -> Scheduler:
    """A scheduler before its first step."""
    probe = copy.deepcopy(scheduler)
    for name in ("_begin_index", "_step_index"):
        if name in probe.__dict__:
            probe.__dict__[name] = None
    return probe


def _draws(scheduler: Scheduler, noise: Tensor, options: Keywords) -> bool:
    """Whether two generators lead the scheduler's steps to two results; some draw late."""
    parameters = parameter_names(original_class(scheduler), "step")
    if "generator" not in parameters:
        return False
    # the one option that pipelines hand on
    given = {name: options[name] for name in ("eta",) if name in parameters and name in options}
    times = scheduler.__dict__["timesteps"]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    probes, latents = [_copy(scheduler) for _ in generators], [noise, noise]
    for time in times:
        for i, (probe, generator) in enumerate(zip(probes, generators)):
            if hasattr(probe, "scale_model_input"):
                probe.scale_model_input(noise, time)
            latents[i] = probe.step(noise, time, latents[i], **given, generator=generator)[0]
        if not torch.equal(*latents):
            return True
    return False


def row_noise(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise of the shape of ``like`` [B, ...], each row from its own generator."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = [torch.randn(like.shape[1:], generator=g, dtype=dtype) for g in generators]
    return torch.stack(rows).to(like.device)
