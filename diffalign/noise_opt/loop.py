"""The loop of every noise optimiser: begin a start, look, move, close.

A method says how it looks (which images it makes, and where the objective rises) and how it moves.
Budgets, several starts, gradients that are not finite and the best image are handled here and by
the problem: whatever was finished and scored is never lost.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffalign.core.errors import warn_once
from diffalign.core.search import Candidate, Info, Method, Problem

TRIES = 3
"""How often a gradient that is not finite halves the rate before a start ends."""


@dataclass(frozen=True, slots=True)
class Climb:
    """Where a method stands in one of its starts."""

    # what is optimised, float32: start noise [1, ...] as ``latents=``, or parameters of its law;
    # None before a start
    point: Tensor | None = None
    # what the optimiser remembers
    moments: tuple[Tensor, ...] = ()
    # of later noise, the same in every iteration
    seed: int = 0
    rate: float = 0.0
    iteration: int = 0
    # the point before the last update, to go back to
    last: Tensor | None = None
    failures: int = 0
    # starts that are over
    starts: int = 0
    # and of them those whose gradient did not reach the noise
    lost: int = 0
    # the score with which this start began
    first: float | None = None
    # the image that the method chooses where that is not the one of the best score, and its value
    choice: Candidate | None = None
    value: float = 0.0
    # whatever else a method remembers
    memory: tuple[Tensor, ...] = ()
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Slope:
    """What one look has shown."""

    # of the objective in the point, in its shape; uphill
    gradient: Tensor
    # mean score of the images
    score: float
    # numbers for the log
    numbers: dict[str, float] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    # further fields of the state that the look has changed
    memory: tuple[Tensor, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the optimiser may follow it."""
        return bool(self.gradient.isfinite().all()) and math.isfinite(self.score)


@dataclass(frozen=True)
class NoiseMethod(Method[Climb]):
    """A method whose candidates are start noises, looked at one after another."""

    seed_level = True

    @property
    def ends(self) -> bool:
        return True

    def init(self, problem: Problem) -> Climb:
        return Climb()

    def finished(self, state: Climb) -> bool:
        return state.ended

    @abstractmethod
    def begin(self, problem: Problem, state: Climb) -> Climb:
        """A new start: its point, its rate, its seed."""

    @abstractmethod
    def closes(self, problem: Problem, state: Climb) -> bool:
        """Whether what comes next is the end of the start."""

    @abstractmethod
    def look(self, problem: Problem, state: Climb, point: Tensor) -> Slope:
        """Make and score images at ``point``; where the objective rises."""

    @abstractmethod
    def move(self, state: Climb, point: Tensor, slope: Slope) -> Climb:
        """The state after one update of the optimiser."""

    @abstractmethod
    def close(self, problem: Problem, state: Climb, point: Tensor) -> tuple[Climb, Info]:
        """The last images of a start, for which no gradient is needed."""

    def over(self, problem: Problem, state: Climb) -> Climb:
        """The state when a start is over: the next one, or the end."""
        return replace(state, ended=True)

    def step(self, problem: Problem, state: Climb) -> tuple[Climb, Info]:
        problem.room(1)
        state = self.begin(problem, state) if state.point is None else state
        point = state.point
        assert point is not None
        if self.closes(problem, state):
            return self.close(problem, state, point)
        slope = self.look(problem, state, point)
        if not slope.finite:
            return self._retreat(problem, state, slope)
        after = self.move(state, point, slope)
        first = slope.score if state.first is None else state.first
        after = replace(
            after,
            iteration=state.iteration + 1,
            last=point,
            first=first,
            memory=slope.memory,
        )
        return after, Info(self.place(after), {"score": slope.score, **slope.numbers})

    @abstractmethod
    def place(self, state: Climb) -> str:
        """Where the run stands, in words."""

    def _retreat(self, problem: Problem, state: Climb, slope: Slope) -> tuple[Climb, Info]:
        """Back to the point before, at half the rate; after three times the start ends.

        Raises: ValueError where not even the first image has a score.
        """
        name = type(self).__name__
        if problem.best is None:
            raise ValueError(
                f"{name}: the reward of the first image is not a finite number; nothing can be "
                "optimised. Try another reward, dtype or seed."
            )
        failures = state.failures + 1
        scored = {"score": slope.score} if math.isfinite(slope.score) else {}
        info = Info("a gradient that is not finite", {"failures": failures, **scored})
        if failures >= TRIES or state.last is None:
            warn_once(
                f"{name}: the gradient was not finite {failures} times, the start ends; the best "
                "image so far is kept.",
            )
            return self.over(problem, replace(state, failures=failures)), info
        back = replace(state, point=state.last, moments=(), rate=state.rate / 2, failures=failures)
        return back, info
