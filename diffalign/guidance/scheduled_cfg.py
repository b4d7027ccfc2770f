"""Guidance weight as a function of progress."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Literal

from diffalign.core import CALL, Context, StepInfo, auto, option
from diffalign.guidance.cfg import WeightedCFG

Shape = Literal[
    "constant",
    "linear",
    "cosine",
    "inverse-linear",
    "sine",
    "v",
    "lambda",
    "interval",
    "pcs",
    "steps",
]

# progress u in [0, 1] -> share of the excess weight; area 1 over [0, 1] except for pcs
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 2.0 * u,
    "cosine": lambda u: 1.0 - math.cos(math.pi * u),
    "inverse-linear": lambda u: 2.0 * (1.0 - u),
    "sine": lambda u: 1.0 + math.cos(math.pi * u),
    "v": lambda u: 2.0 * abs(1.0 - 2.0 * u),
    "lambda": lambda u: 2.0 * (1.0 - abs(1.0 - 2.0 * u)),
}
NAMES = (*SHAPES, "interval", "pcs")
"""Shapes that need no shares."""


def shape_at(
    shape: str, u: float, power: float = 1.0, band: tuple[float, float] = (0.0, 1.0)
) -> float:
    """The shape's value at progress ``u`` in [0, 1]."""
    if shape == "pcs":
        return (1.0 - math.cos(math.pi * u**power)) / 2.0
    if shape == "interval":
        inside = band[0] <= u < band[1] or u == band[1] == 1.0
        return 1.0 / (band[1] - band[0]) if inside else 0.0
    return SHAPES[shape](u)


@cache
def table(
    shape: str,
    count: int,
    power: float,
    band: tuple[float, float],
    normalise: bool,
    shares: tuple[float, ...] = (),
) -> tuple[float, ...]:
    """The shape on the grid of ``count`` steps, ``u = i / (count - 1)``; a single step has no ramp
    and gets 1. ``shares``: the shape itself, for "steps"."""
    if shares and len(shares) != count:
        raise ValueError(f"ScheduledCFG: {len(shares)} shares do not serve {count} steps.")
    if count == 1 and not shares:
        return (1.0,)
    values = list(shares) or [shape_at(shape, i / (count - 1), power, band) for i in range(count)]
    if normalise:
        mean = math.fsum(values) / count
        if mean == 0.0:
            raise ValueError(
                f"ScheduledCFG(shape={shape!r}, normalise=True) has no weight on any of {count} "
                "steps; take more steps or another band."
            )
        values = [value / mean for value in values]
    return tuple(values)


@dataclass(frozen=True, slots=True)
class ScheduledCFG(WeightedCFG):
    """Lets the guidance weight follow ``shape`` over the steps.

    Wang et al. 2024, arXiv:2404.13040, section 4. The paper's omega (``cond + omega (cond -
    uncond)``) is scale - 1. "linear" and "cosine" increase from 0 to twice the mean,
    "inverse-linear" and "sine" decrease, "v" and "lambda" have their dip or peak in the middle,
    "interval" acts in ``band``, "pcs" is ``(1 - cos(pi u^power)) / 2`` with mean 0.5 at power 1,
    "steps" is ``shares``, one for each step, which ``diffalign calibrate policy`` finds. A ramp of
    "excess" scales ``scale - 1``, so that 0 is the conditional model (the paper); "total" scales
    ``scale`` itself, so that 0 is the unconditional model.
    Cost: 2 passes per step; 1 where the weight is exactly 0 or 1 (linear and cosine: the first
    step).
    Refuses: a call with another number of steps than ``shares``.
    Raises: ValueError where ``normalise`` meets a shape without weight on any step.
    """

    scale: float = auto(CALL, "the mean weight; 1 is off", usual=(1.0, 15.0))
    _: KW_ONLY
    shape: Shape = option("linear", "the weight over the steps")
    power: float = option(
        1.0, "exponent of progress in pcs", low=0.0, open_low=True, usual=(0.1, 4.0)
    )
    band: tuple[float, float] = option(
        (0.0, 1.0),
        "part [a, b) of progress where interval acts; b = 1 includes the last step",
        low=0.0,
        high=1.0,
    )
    shares: tuple[float, ...] = option(
        (), "the weight at each step for steps, in units of the mean weight", usual=(0.0, 2.0)
    )
    ramp: Literal["excess", "total"] = option(
        "excess", "what the shape scales: the scale minus 1, or the scale itself"
    )
    normalise: bool = option(
        False, "divide by the mean over the steps, so that the mean weight is exact"
    )
    clamp: float | None = option(
        None,
        "lowest weight, in units of scale (the paper's constant plus 1); raises the mean",
        usual=(0.0, 5.0),
    )

    def check(self) -> None:
        if not self.band[0] < self.band[1]:
            raise ValueError(
                f"ScheduledCFG(band=(a, b)) needs 0 <= a < b <= 1, as progress; got {self.band!r}."
            )
        if (self.shape == "steps") != bool(self.shares):
            raise ValueError(
                "ScheduledCFG(shape='steps', shares=(...)) belong together: one share for each "
                f"step; got shape={self.shape!r} and {len(self.shares)} shares."
            )

    def refuses(self, context: Context) -> str | None:
        if self.shares and context.steps not in (0, len(self.shares)):
            return (
                f"its {len(self.shares)} shares are for {len(self.shares)} steps, and this call "
                f"has {context.steps}; find others with `diffalign calibrate policy`"
            )
        return None

    def weights(self, count: int) -> tuple[float, ...]:
        """The guidance weight of each of ``count`` steps; needs a resolved ``scale``."""
        shares = table(self.shape, count, self.power, self.band, self.normalise, tuple(self.shares))
        # scale * f + (1 - f) rather than 1 + (scale - 1) * f: exact at f = 0 and at f = 1
        weights = [
            self.scale * f + (1.0 - f) if self.ramp == "excess" else self.scale * f for f in shares
        ]
        return tuple(weights if self.clamp is None else [max(self.clamp, w) for w in weights])

    def weight(self, step: StepInfo) -> float:
        return self.weights(step.count)[step.index]
