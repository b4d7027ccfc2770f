"""Which step is this: read once from the scheduler, then counted on the host so that no step waits
for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffalign.core import StepInfo
from diffalign.core.types import Mix


class Clock:
    """Counts ``scheduler.step`` calls, from where it is told that the run begins.

    ``start`` copies the scheduler's tables to the host, the only synchronisation.
    """

    def __init__(self, scheduler: Any, mix: Mix, sigma: Callable[[float], float]) -> None:
        self.scheduler, self.mix, self.sigma_of = scheduler, mix, sigma
        # evaluations since the beginning of the trajectory, those of earlier segments included
        self.calls = 0
        self.order = int(getattr(scheduler, "order", 1))
        self.timesteps: list[float] = []
        # steps of the trajectory
        self.count = 0

    def start(
        self,
        first: float,
        planned: int | None,
        *,
        begin: int = 0,
        whole: int | None = None,
        offset: int | None = None,
    ) -> None:
        """Learn the tables. A segment is told its place in the whole trajectory.

        ``first``: the scheduler timestep of the first denoiser call. ``planned``: evaluations that
        the pipeline announced, if it did. ``begin``: evaluations that earlier segments made.
        ``whole``: evaluations of the whole trajectory, None for as many as are planned.
        ``offset``: entry of the tables where the trajectory begins, None to find it by ``first``.
        """
        self.timesteps = [float(t) for t in vars(self.scheduler)["timesteps"].tolist()]
        self.sigmas = self._sigmas()
        self.next_sigmas = self._following()
        if offset is None:
            entries = range(len(self.timesteps))
            offset = min(entries, key=lambda i: (abs(self.timesteps[i] - first), i)) - begin
        self.offset, self.calls = offset, begin
        remaining = len(self.timesteps) - self.offset
        if whole is None:
            whole = min(planned + begin, remaining) if planned else remaining
        self.count = -(-whole // self.order)

    def _sigmas(self) -> list[float]:
        """Noise level at each timestep, and one more for the end."""
        table = getattr(self.scheduler, "sigmas", None)
        if table is not None and len(table) >= len(self.timesteps):
            values = table.tolist() if isinstance(table, Tensor) else list(table)
            return [
                self.sigma_of(float(v))
                for v in [*values[: len(self.timesteps) + 1], 0.0][: len(self.timesteps) + 1]
            ]
        self._bars = alphas = self.scheduler.alphas_cumprod.tolist()
        final = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        bars = [alphas[min(max(int(t), 0), len(alphas) - 1)] for t in self.timesteps]
        return [_level(a) for a in (*bars, final)]

    def _following(self) -> list[float]:
        """The level that each step goes to.

        DDIM and PNDM go down by ``T // S`` timesteps, which need not be the next one listed.
        """
        scheduler = self.scheduler
        listed = getattr(scheduler, "sigmas", None) is not None or not hasattr(
            scheduler, "num_inference_steps"
        )
        if listed or not type(scheduler).__name__.startswith(("DDIM", "PNDM")):
            return self.sigmas[1:]
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        targets = [int(time) - stride for time in self.timesteps]
        return [_level(self._bars[t]) if t >= 0 else self.sigmas[-1] for t in targets]

    @property
    def place(self) -> int:
        """Where the next call stands in the scheduler's tables."""
        return min(self.offset + self.calls, len(self.timesteps) - 1)

    @property
    def sigma(self) -> float:
        """The noise level there."""
        return self.sigmas[self.place]

    @property
    def time(self) -> float:
        """The scheduler's timestep there."""
        return self.timesteps[self.place]

    def now(self, convert: Callable[..., Tensor]) -> StepInfo:
        i = self.place
        return StepInfo(
            index=self.calls // self.order,
            count=self.count,
            sigma=self.sigmas[i],
            sigma_next=self.next_sigmas[i],
            timestep=self.timesteps[i],
            evaluation=self.calls % self.order,
            mix=self.mix,
            convert=convert,
        )


def _level(bar: float) -> float:
    """sqrt((1 - abar) / abar)."""
    return math.sqrt((1.0 - bar) / max(bar, 1e-20))
