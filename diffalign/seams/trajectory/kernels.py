"""Kernels: what a step draws. A search can branch only where children of one state differ.

A kernel of ours stands in for ``scheduler.step`` on the scheduler's own noise levels. It moves from
level ``sigma`` to ``to`` by ``p * x0 + q * eps + std * z``, where ``x0`` and ``eps`` are what the
network's prediction says and z is standard normal noise from each image's own generator. The
scheduler keeps no history then, so a state is latents and generators alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffalign.core import Transition, UnsupportedModel
from diffalign.core.checks import check_choice, check_range
from diffalign.seams.trajectory.grid import Grid, row_noise
from diffalign.seams.trajectory.schedule import Arrival

Coefficients = tuple[float, float, float]
"""``(p, q, std)`` as above."""

FLOW_KERNELS = "kernel=Eta(1.0), FlowSDE() or VPFlow()"


class Kernel(Protocol):
    """How a trajectory moves from one noise level to the next."""

    def branches(self, grid: Grid) -> bool:
        """Whether it draws noise on these levels."""
        ...

    def refuses(self, grid: Grid) -> str | None:
        """Why it cannot act on these levels, None when it can."""
        ...

    def coefficients(self, grid: Grid, index: int) -> Coefficients | None:
        """``(p, q, std)`` at an evaluation; None where the scheduler makes the step itself."""
        ...


@dataclass(frozen=True, slots=True)
class Native:
    """The scheduler's own step; options such as DDIM's ``eta`` are arguments of the call."""

    def branches(self, grid: Grid) -> bool:
        return grid.draws

    def refuses(self, grid: Grid) -> str | None:
        return None

    def coefficients(self, grid: Grid, index: int) -> Coefficients | None:
        return None


@dataclass(frozen=True, slots=True)
class Eta:
    """The DDIM family of kernels, for variance preserving and flow models.

    Song, Meng and Ermon 2021, arXiv:2010.02502, eq. 12 and 16, for any ``x = a * x0 + s * eps``:
    ``std^2 = eta^2 * (s'^2 / s^2) * (s^2 - (a / a')^2 s'^2)``, ``p = a'``, ``q = sqrt(s'^2 -
    std^2)``. With ``eta`` 0 it is DDIM, or Euler's method on flow models; with 1 DDPM. A step to
    level 0 draws nothing. On flow models ``eta`` 1 forgets the start noise in the first step.
    """

    # in [0, 1]; 0 is deterministic
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_range("Eta", "eta", self.eta, 0.0, 1.0)

    def branches(self, grid: Grid) -> bool:
        return self.eta > 0.0

    def refuses(self, grid: Grid) -> str | None:
        return None

    def coefficients(self, grid: Grid, index: int) -> Coefficients | None:
        levels = grid.parametrisation.levels
        (a, s), (a_to, s_to) = levels(grid.sigmas[index]), levels(grid.following[index])
        rest = max(s * s - (a / a_to) ** 2 * s_to * s_to, 0.0)
        std = min(self.eta * s_to / s * math.sqrt(rest), s_to)
        return a_to, math.sqrt(s_to * s_to - std * std), std


@dataclass(frozen=True, slots=True)
class FlowSDE:
    """A flow model's equation with noise, by the Euler-Maruyama method.

    ``x' = x + [v + g^2 / (2 sigma) * eps] * (sigma' - sigma) + g * sqrt(sigma - sigma') * z`` with
    ``v = eps - x0``: the marginals stay those of the model for any g. ``"3s2"`` is ``3 sigma^2``
    (Kim et al. 2025, arXiv:2503.19385, their repository), ``"s2"`` is ``sigma^2``, and a number a
    is ``a * sqrt(sigma / (1 - sigma))`` (Liu et al. 2025, arXiv:2505.05470, who use 0.7; at sigma 1
    they put the second level into the denominator). 0 is the pipeline's own step.
    Differs from both: the last step draws nothing, so images have no noise left.
    """

    g: Literal["3s2", "s2"] | float = "3s2"

    def __post_init__(self) -> None:
        if isinstance(self.g, str):
            check_choice("FlowSDE", "g", self.g, ("3s2", "s2"))
        else:
            check_range("FlowSDE", "g", self.g, 0.0, 10.0)

    def branches(self, grid: Grid) -> bool:
        return self.g != 0

    def refuses(self, grid: Grid) -> str | None:
        return _flow_only("FlowSDE", grid)

    def coefficients(self, grid: Grid, index: int) -> Coefficients | None:
        sigma, to = grid.sigmas[index], grid.following[index]
        if to <= 0.0:
            return 1.0, 0.0, 0.0
        g = self._g(sigma, to)
        delta = to - sigma
        q = sigma + delta * (1.0 + g * g / (2.0 * sigma))
        return 1.0 - to, q, g * math.sqrt(-delta)

    def _g(self, sigma: float, to: float) -> float:
        if self.g == "3s2":
            return 3.0 * sigma * sigma
        if self.g == "s2":
            return sigma * sigma
        rest = 1.0 - (sigma if sigma < 1.0 else to)
        return float(self.g) * math.sqrt(sigma / rest)


BETA = (0.1, 20.0)
"""Noise rate of the variance preserving path at its two ends."""


@dataclass(frozen=True, slots=True)
class VPFlow:
    """A flow model on the variance preserving path: children of one state differ more.

    Kim, Yoon, Hwang and Sung 2025, arXiv:2503.19385 (RBF): with ``B(s) = s^2 (b1 - b0) / 2 + s b0``
    the path has signal ``A = exp(-B / 2)`` and noise ``S = sqrt(1 - exp(-B))``; its time s belongs
    to the flow's level ``sigma = S / (A + S)``, and its latents are ``A + S`` times the flow's. The
    noise is ``g * sqrt(s - s')``. ``g`` "beta" is the path's own rate ``sqrt(b0 + s (b1 - b0))``,
    "3s2" their repository's ``3 s^2``, for grids with many steps at high noise.
    Differs from the paper: x0 and eps stand still within a step (exact for the part without
    noise, which is then the pipeline's own step), and the last step draws nothing.
    """

    g: Literal["beta", "3s2", "none"] = "beta"

    def __post_init__(self) -> None:
        check_choice("VPFlow", "g", self.g, ("beta", "3s2", "none"))

    def branches(self, grid: Grid) -> bool:
        return self.g != "none"

    def refuses(self, grid: Grid) -> str | None:
        return _flow_only("VPFlow", grid)

    def coefficients(self, grid: Grid, index: int) -> Coefficients | None:
        sigma, to = grid.sigmas[index], grid.following[index]
        if to <= 0.0:
            return 1.0, 0.0, 0.0
        end = path_time(to)
        start = path_time(sigma) if sigma < 1.0 else max(1.0, end)
        g = self._g(start)
        (_, noise), (signal_to, noise_to) = path_levels(start), path_levels(end)
        scale, delta = signal_to + noise_to, end - start
        q = noise_to + delta * g * g / (2.0 * noise)
        return signal_to / scale, q / scale, g * math.sqrt(-delta) / scale

    def _g(self, time: float) -> float:
        if self.g == "none":
            return 0.0
        return 3.0 * time * time if self.g == "3s2" else math.sqrt(_rate(time))


def _rate(time: float) -> float:
    return BETA[0] + time * (BETA[1] - BETA[0])


def path_levels(time: float) -> tuple[float, float]:
    """Signal and noise of the variance preserving path."""
    total = 0.5 * time * time * (BETA[1] - BETA[0]) + time * BETA[0]
    return math.exp(-0.5 * total), math.sqrt(-math.expm1(-total))


def path_time(sigma: float) -> float:
    """The time at which that path has the signal and noise of a flow's level below 1."""
    ratio, slope = sigma / (1.0 - sigma), BETA[1] - BETA[0]
    total = math.log1p(ratio * ratio)
    return (math.sqrt(BETA[0] ** 2 + 2.0 * slope * total) - BETA[0]) / slope


def _flow_only(name: str, grid: Grid) -> str | None:
    if grid.flow:
        return None
    return f"{name} is for flow models; {grid.scheduler} is none here. Use kernel=Eta(1.0)."


def check_kernel(kernel: Kernel, grid: Grid) -> None:
    """Raise ``UnsupportedModel`` where a kernel cannot act on these levels."""
    reason = kernel.refuses(grid)
    if reason is not None:
        raise UnsupportedModel(reason)
    if not isinstance(kernel, Native):
        grid.check_levels(type(kernel).__name__)


def why_alike(kernel: Kernel, grid: Grid) -> str | None:
    """Why children of one state are alike, and what to do; None where they differ."""
    if kernel.branches(grid):
        return None
    if not isinstance(kernel, Native):
        what, advice = f"{kernel!r}", FLOW_KERNELS if grid.flow else "kernel=Eta(1.0)"
    else:
        what, advice = grid.scheduler, FLOW_KERNELS if grid.flow else "kernel=Eta(1.0)"
        if grid.scheduler.startswith(("DDIM", "TCD")):
            advice += ", or eta=1.0 in the call"
        elif grid.order != 1 or grid.scheduler.startswith("PNDM"):
            advice += " with DDIMScheduler"
    return f"{what} draws no noise here, so children of one state are alike. Pass {advice}."


def std_at(kernel: Kernel, grid: Grid, step: int) -> float:
    """Standard deviation of the noise at an evaluation, in the scheduler's scaling.

    Raises: ``UnsupportedModel`` for the scheduler's own steps, which do not say.
    """
    coefficients = kernel.coefficients(grid, step)
    if coefficients is None:
        raise UnsupportedModel(
            f"{grid.scheduler} does not say what noise it adds. Pass kernel=Eta(1.0), or FlowSDE() "
            "on a flow model."
        )
    return coefficients[2] * grid.radius(grid.following[step])


class Drawing:
    """The steps of one segment by a kernel of ours, in the scheduler's place."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Grid,
        generators: Sequence[torch.Generator],
        drift: Tensor | None = None,
    ) -> None:
        self.kernel, self.grid, self.generators = kernel, grid, generators
        # [B, ...] added to the mean of the next step, then gone
        self.drift = drift
        # of the last step, and the clean latents that its prediction says
        self.transition: Transition | None = None
        self.x0: Tensor | None = None

    def __call__(self, arrival: Arrival) -> Tensor:
        coefficients = self.kernel.coefficients(self.grid, arrival.index)
        assert coefficients is not None
        p, q, std = coefficients
        x0, eps = self.grid.read(arrival.output, arrival.sample, arrival.index)
        self.x0 = x0
        radius = self.grid.radius(self.grid.following[arrival.index])
        mean, std = (p * x0 + q * eps) * radius, std * radius
        drift, self.drift = self.drift, None
        self.transition = Transition(mean.detach(), std, drift)
        latents = mean if drift is None else mean + drift.to(mean)
        if std > 0.0:
            latents = latents + std * row_noise(self.generators, mean)
        return latents.to(arrival.sample.dtype)


def drawing_of(
    kernel: Kernel,
    grid: Grid,
    generators: Sequence[torch.Generator],
    drift: Tensor | None = None,
) -> Drawing | None:
    """The steps of one segment by ``kernel``, None where the scheduler makes them itself."""
    return None if isinstance(kernel, Native) else Drawing(kernel, grid, generators, drift)
