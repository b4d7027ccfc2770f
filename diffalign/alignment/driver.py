"""The loop: a method step by step until the budget, the user or the method ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from diffalign.alignment.checkpoint import Folder
from diffalign.alignment.problem import PipelineProblem
from diffalign.alignment.scoring import BadScore
from diffalign.core import BudgetExceeded, Cancelled
from diffalign.core.errors import warn_once
from diffalign.core.search import Candidate, Info, Method
from diffalign.core.types import Json

IDLE = 1000
"""Steps in a row that cost nothing, after which a method is taken to go round in circles."""


@dataclass(slots=True)
class Status:
    """Where a run stands, for whoever shows it."""

    step: int
    nfe: int
    seconds: float
    # None before the first finished image
    best: float | None
    info: Info


@dataclass(slots=True)
class Drive:
    """One run of a method on a problem."""

    method: Method[Any]
    problem: PipelineProblem
    # what the run is: its folder and its images carry this
    settings: Json
    folder: Folder | None = None
    # called after each step
    show: Callable[[Status], None] | None = None
    steps: int = 0
    state: Any = None
    # why it ended: "finished", "budget", "interrupted" or "idle"
    end: str = ""
    # numbers that the method reported, one entry per step
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        """The result if the run ended now: what the method says, else the best finished image."""
        best = self.problem.best
        return best if self.state is None else self.method.best(self.problem, self.state) or best

    def run(self) -> None:
        """Run to the end; whatever ends it, ``best`` is valid.

        A budget, the user, memory that ends or a score that is no number end it with the best image
        so far, the last two with a warning.
        Raises: what the pipeline or the reward raises; the folder then holds the last whole step.
        """
        try:
            self._loop()
        except (BudgetExceeded, KeyboardInterrupt, Cancelled) as error:
            if self.best is None:
                raise
            budget = isinstance(error, BudgetExceeded)
            self.end = f"budget: {error}" if budget else "interrupted"
        except (torch.OutOfMemoryError, BadScore) as error:
            if self.best is None:
                raise
            kind = "reward" if isinstance(error, BadScore) else "out of memory"
            self.end = f"{kind}: {error}"
            name = type(self.method).__name__
            warn_once(f"{name} ended early with the best image so far. {self.end}")

    def _loop(self) -> None:
        self._restore()
        if self.state is None:
            self.state = self.method.init(self.problem)
        idle, meter = 0, self.problem.meter
        while not self.method.finished(self.state):
            before = (meter.rows, meter.rewards)
            self.state, info = self.method.step(self.problem, self.state)
            self.steps += 1
            self.log.append({"nfe": meter.rows, **info.values})
            self._save()
            if self.show is not None:
                best = self.best
                score = None if best is None else best.score
                self.show(Status(self.steps, meter.rows, meter.seconds, score, info))
            idle = idle + 1 if before == (meter.rows, meter.rewards) else 0
            if idle >= IDLE:
                self.end = f"idle: {IDLE} steps in a row cost nothing"
                return
        self.end = "finished"

    def _save(self) -> None:
        if self.folder is None:
            return
        progress = self.problem.progress
        meter, ranking = progress.meter, progress.ranking
        self.folder.save(
            {
                "method": self.state,
                "steps": self.steps,
                "log": self.log,
                "rng": progress.rng.get_state(),
                "seeds": progress.seeds,
                "batch": progress.fit.size,
                "sampling": (progress.sampling, progress.looking),
                "history": progress.history,
                "ranking": (ranking.top, ranking.first, ranking.scored, ranking.equal),
                "meter": {name: getattr(meter, name) for name in COUNTS},
                "seconds": meter.seconds,
            }
        )

    def _restore(self) -> None:
        saved = self.folder.load() if self.folder is not None else None
        if saved is None:
            return
        progress = self.problem.progress
        meter, ranking = progress.meter, progress.ranking
        self.state, self.steps, self.log = saved["method"], saved["steps"], saved["log"]
        progress.rng.set_state(saved["rng"])
        progress.seeds, progress.fit.size = saved["seeds"], saved["batch"]
        progress.sampling, progress.looking = saved["sampling"]
        progress.history = saved["history"]
        ranking.top, ranking.first, ranking.scored, ranking.equal = saved["ranking"]
        for name, value in saved["meter"].items():
            setattr(meter, name, value)
        meter.started = perf_counter() - saved["seconds"]


COUNTS = ("rows", "calls", "evaluations", "decodes", "rewards", "backward")
