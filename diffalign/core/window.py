"""When a technique acts: a band of noise levels or a part of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from diffalign.core.errors import warn_once
from diffalign.core.option import option
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
    """Options of techniques that act only for a while, as in ``class Mine(Windowed, TwoBranches)``.

    A window is a band of noise levels or a part of the steps; intervals are half-open. With
    ``sigma`` the other two have no say. Where a technique has a default window for the model,
    ``sigma=(0, inf)`` acts at every step.
    """

    sigma: tuple[float, float] | None = option(
        None, "acts while lo <= noise level < hi, levels as in StepInfo", low=0.0, infinite=True
    )
    start: float = option(
        0.0, "first step that acts, as a fraction of the steps", low=0.0, high=1.0
    )
    stop: float = option(
        1.0, "first step that no longer acts, as a fraction of the steps", low=0.0, high=1.0
    )

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

    def check(self) -> None:
        """Raise ValueError where options contradict each other; each alone is right already."""
        self.check_window()

    def check_window(self) -> None:
        """Raise ValueError unless the window is one, and not empty."""
        owner = type(self).__name__
        if self.sigma is None:
            if not self.start < self.stop:
                raise ValueError(
                    f"{owner} needs 0 <= start < stop <= 1, as fractions of the steps; got "
                    f"start={self.start}, stop={self.stop}."
                )
            return
        defaults: dict[str, object] = {f.name: f.default for f in fields(self)}
        steps = (self.start, self.stop)
        if steps not in ((0.0, 1.0), (defaults["start"], defaults["stop"])):
            raise ValueError(
                f"{owner} takes sigma=(lo, hi) or start/stop, not both; got sigma={self.sigma}, "
                f"{self.start}, {self.stop}."
            )
        if not self.sigma[0] < self.sigma[1]:
            raise ValueError(f"{owner}(sigma=(lo, hi)) needs 0 <= lo < hi; got {self.sigma}.")
