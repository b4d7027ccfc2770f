"""The one place that counts what work costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from time import perf_counter
from typing import Any

from diffalign.core.errors import BudgetExceeded, Cancelled, nearest


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits; None is no limit."""

    # denoiser rows: one row through the denoiser is one NFE
    nfe: int | None = None
    # images scored by rewards
    rewards: int | None = None
    # wall time; a search times two evaluations, a decode and a score first, which no count holds
    seconds: float | None = None
    # images decoded from latents
    decodes: int | None = None
    # backward passes, in rows
    backward: int | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(
                    f"Budget({name}=...) must be positive or None, and a finite number; got "
                    f"{value!r}."
                )


def read_budget(text: str) -> Budget:
    """``"nfe=400,seconds=20"`` -> a budget.

    Raises: ValueError for unknown limits, with the nearest ones, and for bad numbers.
    """
    names = tuple(f.name for f in fields(Budget))
    limits: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in names:
            raise ValueError(
                f"{item.strip()!r} is not one of {', '.join(names)} with a number, like nfe=400. "
                f"Nearest: {nearest(key, names)}."
            )
        try:
            number = float(value)
        except ValueError as error:
            raise ValueError(f"{key} must be a number; got {value!r}.") from error
        if key != "seconds" and not number.is_integer():
            raise ValueError(f"{key} must be a whole number; got {value!r}.")
        limits[key] = number if key == "seconds" else int(number)
    return Budget(**limits)


@dataclass(slots=True)
class Meter:
    """Counts denoiser rows (one row is one NFE), calls, evaluations, decodes, rewards and backward
    passes.

    ``charge`` raises ``BudgetExceeded`` before the work that would pass the budget, its own or one
    of ``others``, and then counts nothing.
    """

    budget: Budget = Budget()
    rows: int = 0
    calls: int = 0
    decodes: int = 0
    rewards: int = 0
    backward: int = 0
    # images times evaluations of the model, whatever number of rows each needed
    evaluations: int = 0
    # meters that are charged with the same work: those of the sessions around a generation
    others: tuple[Meter, ...] = ()
    # asked before any work; once it says yes, the work is refused with ``Cancelled``
    stop: Callable[[], bool] | None = None
    started: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time since the meter was made."""
        return perf_counter() - self.started

    @property
    def nfe(self) -> int:
        """Denoiser rows, by the name that papers use."""
        return self.rows

    def charge(
        self,
        *,
        rows: int = 0,
        decodes: int = 0,
        rewards: int = 0,
        backward: int = 0,
        joined: bool = False,
    ) -> None:
        """Count work before it is done. ``joined``: the rows join a call already counted."""
        for meter in (self, *self.others):
            meter.check(rows, decodes, rewards, backward)
        for meter in (self, *self.others):
            meter.rows += rows
            meter.calls += rows > 0 and not joined
            meter.decodes += decodes
            meter.rewards += rewards
            meter.backward += backward

    def note(self, *, evaluations: int) -> None:
        """Count evaluations that were made; their rows are charged already: nothing is refused."""
        for meter in (self, *self.others):
            meter.evaluations += evaluations

    def check(self, rows: int = 0, decodes: int = 0, rewards: int = 0, backward: int = 0) -> None:
        """Raise ``BudgetExceeded`` when this work would pass the budget, ``Cancelled`` once it is
        to stop; count nothing."""
        if self.stop is not None and self.stop():
            raise Cancelled("The run was stopped; the pipeline is as it was before.")
        limits = (
            ("nfe", self.budget.nfe, self.rows + rows),
            ("rewards", self.budget.rewards, self.rewards + rewards),
            ("decodes", self.budget.decodes, self.decodes + decodes),
            ("backward", self.budget.backward, self.backward + backward),
        )
        for name, limit, total in limits:
            if limit is not None and total > limit:
                raise BudgetExceeded(f"{name}: {total} would pass the budget of {limit}.")
        if self.budget.seconds is not None and self.seconds > self.budget.seconds:
            raise BudgetExceeded(
                f"seconds: {self.seconds:.1f} passed the budget of {self.budget.seconds:g}."
            )
