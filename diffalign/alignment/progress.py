"""What a run and its variants share: counters, the best images, the sampler that is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

from diffalign.alignment.processes import World
from diffalign.alignment.scoring import Fit, Ranking, Scorer
from diffalign.alignment.setting import AnySampler
from diffalign.core import Budget, BudgetExceeded, Meter
from diffalign.core.search import Candidate


@dataclass(frozen=True, slots=True)
class Moment:
    """What had been spent when the best image changed."""

    nfe: int
    evaluations: int
    seconds: float
    score: float


@dataclass(slots=True)
class Pace:
    """How long one kind of work takes, by all of it so far."""

    seconds: float = 0.0
    units: int = 0

    def add(self, seconds: float, units: int) -> None:
        """Count work that was done."""
        self.seconds += seconds
        self.units += units

    @property
    def each(self) -> float:
        """Seconds of one unit, 0 before the first."""
        return self.seconds / self.units if self.units else 0.0


@dataclass(slots=True)
class Progress:
    """Counters, the best images, and the one sampler that is open."""

    meter: Meter
    ranking: Ranking
    scorer: Scorer
    fit: Fit
    rng: torch.Generator
    # seeds drawn
    seeds: int = 0
    history: list[Moment] = field(default_factory=list)
    world: World = field(default_factory=World)
    # rows of the final call
    reserve: int = 0
    # what denoiser rows take, and what decoding and scoring an image takes
    sampling: Pace = field(default_factory=Pace)
    looking: Pace = field(default_factory=Pace)
    open: AnySampler | None = None
    # called with the newest best image
    improved: Callable[[Candidate], None] | None = None

    def use(self, sampler: AnySampler | None) -> None:
        """Open this sampler and close the one before."""
        if self.open is sampler:
            return
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = None
        if sampler is not None:
            sampler.__enter__()
            self.open = sampler

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around work of the sampler: its seconds and rows say what further rows take."""
        before, start = self.meter.rows, perf_counter()
        yield
        self.sampling.add(perf_counter() - start, self.meter.rows - before)

    @contextmanager
    def looked(self, images: int) -> Iterator[None]:
        """Around decoding and scoring of so many images: their seconds say what further ones
        take."""
        start = perf_counter()
        yield
        self.looking.add(perf_counter() - start, images)

    def numbers(self, count: int) -> list[int]:
        """Numbers of the next images; those of other processes lie between."""
        first = self.seeds
        self.seeds += count
        return [i * self.world.size + self.world.rank for i in range(first, first + count)]

    def remember(self, candidate: Candidate) -> None:
        """Take over a finished image."""
        if self.ranking.add(candidate):
            meter = self.meter
            moment = Moment(meter.rows, meter.evaluations, meter.seconds, candidate.score)
            self.history.append(moment)
            if self.improved is not None:
                self.improved(candidate)

    def room(self, count: int, price: int, scores: int) -> int:
        """How many of ``count`` images of ``price`` rows and ``scores`` scores the budget lets run.

        Raises: ``BudgetExceeded`` where not even one fits beside the final call.
        """
        if count < 1:
            raise ValueError(f"room(count=...) must be at least 1; got {count}.")
        budget, meter = self.meter.budget, self.meter
        shares = [
            (budget.nfe, meter.rows + self.reserve, price),
            (budget.decodes, meter.decodes + 1, scores),
            (budget.rewards, meter.rewards + 1, scores),
        ]
        fits = [count]
        fits += [(limit - spent) // each for limit, spent, each in shares if limit and each]
        takes, kept, spent = f"{price} NFE", f"{self.reserve} NFE", f"{meter.rows} NFE"
        if budget.seconds is not None:
            fits.append(self._in_time(budget.seconds - meter.seconds, count, price, scores))
            each, look = self.sampling.each, self.looking.each
            takes += f" and about {price * each + scores * look:.1f} s"
            kept += f" and {self.reserve * each + look:.1f} s"
            spent += f" and {meter.seconds:.1f} s"
        if min(fits) < 1:
            raise BudgetExceeded(
                f"The budget {_text(budget)} has no room for one more image: it takes {takes}, "
                f"{kept} are kept for the final call, and {spent} are spent."
            )
        return min(fits)

    def _in_time(self, left: float, count: int, price: int, scores: int) -> int:
        """How many of ``count`` images fit into ``left`` seconds beside the final call."""
        left -= self.reserve * self.sampling.each + self.looking.each
        each = price * self.sampling.each + scores * self.looking.each
        if left <= 0:
            return 0
        return min(count, int(left / each)) if each else count


def _text(budget: Budget) -> str:
    limits = {
        name: getattr(budget, name)
        for name in ("nfe", "rewards", "seconds", "decodes", "backward")
        if getattr(budget, name) is not None
    }
    return ", ".join(f"{name}={limit:g}" for name, limit in limits.items()) or "without limits"
