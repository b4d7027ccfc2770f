"""What a generation notes down while it runs, and the report made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from diffalign.core import Guidance, Meter, StepInfo
from diffalign.core.window import Windowed, never_acted
from diffalign.seams.denoiser.branch_log import BranchLog

Resolved = dict[str, dict[str, tuple[Any, str]]]
"""Technique -> option -> (value, where it came from)."""


@dataclass(slots=True)
class Record:
    """Notes of one generation; scalars stay on the device until somebody asks."""

    resolved: Resolved
    # technique -> (layers where it acted, layers selected)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    # technique -> number of steps in which it acted
    acted: dict[str, int] = field(default_factory=dict)
    # attention backend -> layers at which techniques' dense calls ran on it
    backends: dict[str, int] = field(default_factory=dict)
    # technique -> what it left out, as in the report
    pruning: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # noise level at which the trajectory begins, None before the first step
    first: float | None = None
    # step -> noise level
    sigma: dict[int, float] = field(default_factory=dict)
    # steps that ran both branches
    guided_steps: set[int] = field(default_factory=set)
    log: BranchLog = field(default_factory=BranchLog)
    began: float = field(default_factory=perf_counter)
    # evaluations of the chunks of video that the call has finished, and calls that read them
    earlier: int = 0
    readings: int = 0

    def number(self, step: StepInfo) -> int:
        """Number of a step in the report, where each chunk counts its own."""
        return self.earlier + step.index

    def facts(self, meter: Meter, batch: int, evaluations: int, order: int) -> dict[str, Any]:
        """Fields of the report. ``evaluations``: calls of ``scheduler.step``."""
        steps = -(-evaluations // order)
        return {
            "images": batch,
            "steps": steps,
            "guided_steps": len(self.guided_steps),
            "nfe": meter.rows / max(batch, 1),
            "nfe_cfg": 2.0 * (evaluations + self.readings),
            "rows": meter.rows,
            "calls": meter.calls,
            "decodes": meter.decodes,
            "rewards": meter.rewards,
            "seconds": perf_counter() - self.began,
            "sigma": [self.sigma.get(step, float("nan")) for step in range(steps)],
            "layers": dict(self.layers),
            "acted": dict(self.acted),
            "backends": dict(self.backends),
            "pruning": dict(self.pruning),
            "resolved": self.resolved,
            "notes": list(self.notes),
        }

    def idle(self, guidances: Iterable[Guidance[Any]], steps: int) -> list[str]:
        """Notes about guidances whose window held no step of the run, or of its last chunk of
        ``steps``, also said as warnings."""
        if not self.sigma:
            return []
        levels = {n - self.earlier: v for n, v in self.sigma.items() if n >= self.earlier}
        windowed = {type(g).__name__: g for g in guidances if isinstance(g, Windowed)}
        return [
            never_acted(name, levels)
            for name, guidance in windowed.items()
            if not guidance.acts_in(levels, steps)
        ]
