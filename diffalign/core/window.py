"""When a technique acts: a band of noise levels or a part of the steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.core.errors import warn_once
from diffalign.core.types import StepInfo


def never_acted(owner: str, levels: Mapping[int, float]) -> str:
    """A note for the report about a window that held no step of a run, whose noise levels these
    are; also said once as a warning."""
    first, *_, last = [*levels.values()] * 2
    note = (
        f"{owner} never acted: its window holds none of this run's {len(levels)} steps (noise "
        f"levels {first:.3g} to {last:.3g})."
    )
    warn_once(f"{note} Give it another; sigma=(0, inf) acts at every step.")
    return note


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowed:
    """Options of techniques that act only for a while. Intervals are half-open.

    ``sigma=(lo, hi)``: acts while ``lo <= sigma < hi`` (noise levels as in ``StepInfo``).
    ``start``, ``stop``: fractions of the steps in [0, 1], acts for ``floor(start * S) <= index <
    floor(stop * S)``. Give one or the other. Where a technique has a default window for the model,
    ``sigma=(0, inf)`` acts at every step.
    """

    sigma: tuple[float, float] | None = None
    start: float = 0.0
    stop: float = 1.0

    def active(self, step: StepInfo) -> bool:
        """Whether the technique acts at this step."""
        return self._holds(step.index, step.sigma, step.count)

    def acts_in(self, levels: Mapping[int, float], count: int) -> bool:
        """Whether any step of a run is inside.

        ``levels``: index -> noise level; ``count``: number of steps.
        """
        return any(self._holds(index, level, count) for index, level in levels.items())

    def _holds(self, index: int, sigma: float, count: int) -> bool:
        if self.sigma is not None:
            return self.sigma[0] <= sigma < self.sigma[1]
        first, last = (math.floor(fraction * count + 1e-9) for fraction in (self.start, self.stop))
        return first <= index < last

    def check_window(self) -> None:
        """Raise ValueError unless the window is one, and not empty."""
        owner = type(self).__name__
        if self.sigma is not None:
            if not isinstance(self.sigma, list | tuple):
                raise TypeError(
                    f"{owner}(sigma=...) must be two noise levels (lo, hi) or None; got "
                    f"{self.sigma!r}."
                )
            object.__setattr__(self, "sigma", tuple(self.sigma))
            if (self.start, self.stop) != (0.0, 1.0):
                raise ValueError(
                    f"{owner} takes sigma=(lo, hi) or start/stop, not both; got "
                    f"sigma={self.sigma}, {self.start}, {self.stop}."
                )
            if len(self.sigma) != 2 or not 0.0 <= self.sigma[0] < self.sigma[1]:
                raise ValueError(f"{owner}(sigma=(lo, hi)) needs 0 <= lo < hi; got {self.sigma}.")
        elif not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                f"{owner} needs 0 <= start < stop <= 1, as fractions of the steps; got "
                f"start={self.start}, stop={self.stop}."
            )
