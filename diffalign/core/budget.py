"""The one place that counts what a run costs."""

from dataclasses import dataclass, field
from time import perf_counter

from diffalign.core.errors import BudgetExceeded


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits; None is no limit. ``nfe``: denoiser rows. ``rewards``: scored images.
    ``seconds``: wall time."""

    nfe: int | None = None
    rewards: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("nfe", "rewards", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Budget({name}=...) must be positive or None; got {value!r}.")


@dataclass(slots=True)
class Meter:
    """Counts rows through the denoiser (one row is one NFE), calls, decodes, reward evaluations and
    backward passes.

    ``charge`` raises ``BudgetExceeded`` *before* the work when it would pass the budget.
    """

    budget: Budget = Budget()
    rows: int = 0
    calls: int = 0
    decodes: int = 0
    rewards: int = 0
    backward: int = 0
    started: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.started

    def charge(
        self,
        *,
        rows: int = 0,
        decodes: int = 0,
        rewards: int = 0,
        backward: int = 0,
        joined: bool = False,
    ) -> None:
        """``joined``: the rows join a denoiser call that is already counted."""
        limits = (
            (self.budget.nfe, self.rows + rows, "nfe"),
            (self.budget.rewards, self.rewards + rewards, "rewards"),
        )
        for limit, after, name in limits:
            if limit is not None and after > limit:
                raise BudgetExceeded(f"{name}: {after} would pass the budget of {limit}.")
        if self.budget.seconds is not None and self.seconds > self.budget.seconds:
            raise BudgetExceeded(
                f"seconds: {self.seconds:.1f} passed the budget of {self.budget.seconds}."
            )
        self.rows += rows
        self.calls += rows > 0 and not joined
        self.decodes += decodes
        self.rewards += rewards
        self.backward += backward
