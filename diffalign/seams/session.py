"""Sessions: techniques on one pipeline object, for a ``with`` block or until ``disable``."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from diffalign.core import Budget, Guidance, Meter, SessionError, Technique, TokenTechnique
from diffalign.core.registry import from_config, to_config
from diffalign.families import family_of
from diffalign.seams import swap
from diffalign.seams.call import generate
from diffalign.seams.denoiser.branch_log import BranchLog
from diffalign.seams.denoiser.tap import Generation, Start
from diffalign.seams.guiders_in import as_technique
from diffalign.seams.report import Report

_STACKS: weakref.WeakKeyDictionary[Any, list[Session]] = weakref.WeakKeyDictionary()


class Session:
    """Techniques that act on one pipeline object; ``apply`` and ``enable`` make it.

    It can be entered once. ``meter`` counts what all its generations cost and stops them at its
    budget.
    """

    def __init__(
        self,
        pipe: Any,
        techniques: Sequence[Any],
        meter: Meter | None = None,
        lasting: bool = False,
    ) -> None:
        self.family = family_of(swap.original_class(pipe))
        self.techniques: tuple[Technique, ...] = tuple(map(as_technique, techniques))
        for technique in self.techniques:
            if not isinstance(technique, Technique):
                raise TypeError(
                    f"apply takes techniques like da.CFG(5.0); got {technique!r}. `diffalign "
                    "techniques` lists them."
                )
        self.meter = meter or Meter()
        self.lasting = lasting
        # where the next generation begins in its trajectory, None at the start
        self.start: Start | None = None
        # the generation that is running
        self.generation: Generation | None = None
        # states of the techniques after the last generation
        self.states: dict[str, Any] = {}
        self._pipe = weakref.ref(pipe)
        self._report = Report(pipeline=swap.original_class(pipe).__name__)
        self._log: BranchLog | None = None
        _check_together([*active(pipe), *self.techniques])

    def __enter__(self) -> Self:
        pipe = self._pipe()
        if pipe is None:
            raise SessionError("The pipeline of this session no longer exists.")
        stack = _STACKS.setdefault(pipe, [])
        if self in stack:
            raise SessionError("This session is already active; make a new one with apply(...).")
        _check_together([*active(pipe), *self.techniques])
        swap.acquire(pipe, "__call__", _handler)
        stack.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the techniques off the pipeline.

        Sessions close in reverse order; closing twice is harmless.
        """
        pipe = self._pipe()
        stack = _STACKS.get(pipe, []) if pipe is not None else []
        if self not in stack:
            return
        if stack[-1] is not self:
            raise SessionError(
                "A session opened later is still active on this pipeline; close that one first."
            )
        stack.pop()
        swap.release(pipe)
        if not stack and pipe is not None:
            del _STACKS[pipe]

    def finish(self, report: Report, generation: Generation) -> None:
        """Take over what a finished generation leaves."""
        self._report, self._log = report, generation.record.log
        self.states = generation.states

    def report(self) -> Report:
        """The last finished generation; an empty report before the first."""
        if self._log is not None:
            report = self._report
            report.scale, report.orthogonal, report.cosine = self._log.columns(report.steps)
            self._log = None
        return self._report

    def config(self) -> dict[str, Any]:
        """The techniques and their options as JSON data; ``techniques_of`` reads it back."""
        from diffalign import __version__

        return {"diffalign": __version__, "techniques": [to_config(t) for t in self.techniques]}

    def cancel(self) -> None:
        """Stop the running generation at its next denoiser call with ``Cancelled``.

        Without one, nothing happens.
        """
        if self.generation is not None:
            self.generation.cancelled = True


def apply(
    pipe: Any, *techniques: Any, budget: Budget | None = None, meter: Meter | None = None
) -> Session:
    """Techniques for a ``with`` block: ``with da.apply(pipe, da.AdaptiveGuidance()) as session:``.

    ``budget``: limits for all generations of the session together; the call that would pass one
    raises ``BudgetExceeded`` before that work is done. ``meter``: count into this one instead.
    An inner ``apply`` on the same pipeline adds its techniques to the outer ones.
    Raises: ``UnsupportedModel`` when the pipeline or a technique on it is not supported,
    ``ValueError`` for techniques that conflict and for a budget beside a meter.
    """
    if budget is not None and meter is not None:
        raise ValueError("apply takes budget=... or meter=..., not both; a meter has its budget.")
    return Session(pipe, techniques, Meter(budget) if budget is not None else meter)


def enable(pipe: Any, *techniques: Any) -> Session:
    """Techniques until ``disable(pipe)``.

    Raises: like ``apply``, and ``SessionError`` when techniques are already active.
    """
    family_of(swap.original_class(pipe))
    if _STACKS.get(pipe):
        raise SessionError(
            "Techniques are already active on this pipeline; call disable(pipe) first, or add some "
            "with apply(...)."
        )
    return Session(pipe, techniques, lasting=True).__enter__()


def disable(pipe: Any) -> None:
    """Undo ``enable``; without one, nothing happens.

    Raises: ``SessionError`` inside an ``apply`` block.
    """
    stack = _STACKS.get(pipe, [])
    if any(not session.lasting for session in stack):
        raise SessionError("disable(pipe) inside an apply block: leave the block instead.")
    for session in list(stack):
        session.close()


def active(pipe: Any) -> tuple[Technique, ...]:
    """The techniques now active on ``pipe``, outermost first."""
    return tuple(t for session in _STACKS.get(pipe, []) for t in session.techniques)


def techniques_of(config: dict[str, Any]) -> tuple[Any, ...]:
    """The techniques of ``Session.config()`` or of a saved PNG's settings.

    Raises: ValueError where there are none, as in a sheet.
    """
    if "techniques" not in config:
        where = (
            "a contact sheet holds several: take one of its columns"
            if "columns" in config
            else "pass Session.config() or a PNG's settings"
        )
        raise ValueError(
            f"techniques_of needs settings with 'techniques'; got {sorted(config)}: {where}."
        )
    return tuple(from_config(item) for item in config["techniques"])


def _check_together(techniques: Sequence[Technique]) -> None:
    """Two guidances, two token techniques, or one class twice, cannot act together."""
    classes: set[type] = set()
    guidance = pruning = ""
    for technique in techniques:
        name = type(technique).__name__
        if type(technique) in classes:
            raise ValueError(f"{name} is given twice; each technique acts once. Keep one of them.")
        classes.add(type(technique))
        if isinstance(technique, Guidance):
            if guidance:
                raise ValueError(
                    f"{guidance} and {name} are both guidances; only one can form the prediction."
                )
            guidance = name
        if isinstance(technique, TokenTechnique):
            if pruning:
                raise ValueError(
                    f"{pruning} and {name} both choose the tokens that a step computes; only one "
                    "can."
                )
            pruning = name


def _handler(pipe: Any) -> swap.Handler | None:
    stack = _STACKS.get(pipe)
    return functools.partial(generate, pipe, stack) if stack else None
