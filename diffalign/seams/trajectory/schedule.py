"""A scheduler that shows the pipeline a part of its timesteps while its own methods keep them all.

The scheduler object stays what it is: for the length of one segment its class is a same-named
subclass. ``set_timesteps`` runs in full and restores the history that earlier segments left;
``timesteps`` is a window for everybody but the scheduler's own methods; ``init_noise_sigma`` is 1
on resume, because the latents are no longer noise; ``set_begin_index`` counts from the window;
``step`` draws its noise from one generator per image, also where the pipeline hands none on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.core.rows import join_values
from diffalign.core.types import Scheduler
from diffalign.seams.denoiser.rows import parameter_names

_CLASSES: dict[type, type] = {}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scheduler remembers between two steps beyond its tables."""

    values: Mapping[str, Any]
    # images whose history this is
    batch: int

    def select(self, rows: Sequence[int]) -> Snapshot:
        """The history of those images."""
        values = {name: _select(value, rows, self.batch) for name, value in self.values.items()}
        return Snapshot(values, len(rows))

    def join(self, others: Sequence[Self], sizes: Sequence[int]) -> Snapshot:
        """The history of all images."""
        snapshots = [self, *others]
        longer = [s.select([0] * (s.batch + 1)).values for s in snapshots]
        values: Any = join_values([s.values for s in snapshots], longer, sizes, "scheduler")
        return Snapshot(values, sum(sizes))


def _select(value: Any, rows: Sequence[int], batch: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value[list(rows)]
    if isinstance(value, list | tuple):
        return type(value)(_select(item, rows, batch) for item in value)
    return value


@dataclass(frozen=True, slots=True)
class Arrival:
    """One call of ``scheduler.step``: what the pipeline handed in."""

    # evaluation of the trajectory
    index: int
    # [B, ...] the guided prediction and the latents that it was made for
    output: Tensor
    sample: Tensor


# what a kernel does instead of ``scheduler.step``: the next latents [B, ...]
Replacement = Callable[[Arrival], Tensor]


@dataclass(slots=True)
class Window:
    """One segment: evaluations ``first`` to ``last`` of the schedule."""

    first: int
    # None for all that remain
    last: int | None = None
    history: Snapshot | None = None
    # one per image, for schedulers whose pipeline hands none on; empty to leave that as it is
    generators: Sequence[torch.Generator] = ()
    # makes the step in the scheduler's place, None for the scheduler's own
    replacement: Replacement | None = None
    # how deep we are in the scheduler's own methods
    depth: int = 0
    # evaluations of the whole schedule, once ``set_timesteps`` has run
    count: int = 0
    # evaluations made in this segment
    calls: int = 0
    # the last of them
    arrival: Arrival | None = None
    # whether the pipeline multiplies what it starts from
    multiplied: bool = False
    # attributes right after ``set_timesteps``: what differs later is history
    tables: dict[str, Any] = field(default_factory=dict)

    def snapshot(self, scheduler: Scheduler, batch: int) -> Snapshot:
        """What the scheduler remembers now."""
        values = {
            name: list(value) if isinstance(value, list) else value
            for name, value in scheduler.__dict__.items()
            if not name.startswith("_diffalign") and _differs(value, self.tables.get(name, self))
        }
        return Snapshot(values, batch)


def _differs(value: Any, table: Any) -> bool:
    """Whether an attribute has changed; lists are changed in place."""
    if isinstance(value, list) and isinstance(table, list) and len(value) == len(table):
        return any(a is not b for a, b in zip(value, table))
    return value is not table


def _window(scheduler: Scheduler) -> Window:
    window: Window = scheduler.__dict__["_diffalign_window"]
    return window


def _inside(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` as the scheduler's own: within it, ``timesteps`` are all of them."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        window = _window(self)
        if window.depth:
            return method(self, *args, **kwargs)
        run = method
        if name == "set_begin_index":
            args, kwargs = _shifted(window, args, kwargs)
        elif name == "step":
            run = functools.partial(_step, method)
        window.depth += 1
        try:
            result = run(self, *args, **kwargs)
            if name == "set_timesteps":
                _restore(self, window)
        finally:
            window.depth -= 1
        return result

    # diffusers asks for it at each call of the pipeline
    call.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return call


def _shifted(
    window: Window, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (args[0] + window.first, *args[1:]), kwargs
    return args, {"begin_index": kwargs.get("begin_index", 0) + window.first}


def _step(method: Callable[..., Any], scheduler: Scheduler, *args: Any, **kwargs: Any) -> Any:
    """``scheduler.step`` was called by the pipeline: the scheduler's own, or the kernel's."""
    window = _window(scheduler)
    names = parameter_names(type(scheduler)._diffalign_base, "step")
    arguments = {**dict(zip(names, args)), **kwargs}
    index = window.first + window.calls
    window.arrival = Arrival(index, arguments["model_output"], arguments["sample"])
    window.calls += 1
    if window.replacement is None:
        if window.generators and "generator" in names and arguments.get("generator") is None:
            arguments["generator"] = one_or_all(window.generators)
        return method(scheduler, **arguments)
    latents = window.replacement(window.arrival)
    if hasattr(scheduler, "_step_index"):  # the scheduler scales its next input by it
        scheduler._step_index = index + 1
    if not arguments.get("return_dict", True):
        return (latents,)
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=latents)


def one_or_all(generators: Sequence[torch.Generator]) -> torch.Generator | list[torch.Generator]:
    """Generators as a pipeline takes them: a list for several images."""
    return list(generators) if len(generators) > 1 else generators[0]


def _restore(scheduler: Scheduler, window: Window) -> None:
    """After ``set_timesteps``: remember the tables and put the history back."""
    window.count = len(scheduler.__dict__["timesteps"])
    window.tables = {
        name: list(value) if isinstance(value, list) else value
        for name, value in scheduler.__dict__.items()
    }
    if window.history is not None:
        for name, value in window.history.values.items():
            scheduler.__dict__[name] = _copy(value)


def _copy(value: Any) -> Any:
    """History that the scheduler may change in place, as some add to a tensor."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _timesteps(scheduler: Scheduler) -> Any:
    window, whole = _window(scheduler), scheduler.__dict__["timesteps"]
    return whole if window.depth or not window.count else whole[window.first : window.last]


def _set_timesteps(scheduler: Scheduler, value: Any) -> None:
    scheduler.__dict__["timesteps"] = value


def _noise_sigma(base: type) -> property:
    """``init_noise_sigma``: 1 on resume, the scheduler's own otherwise."""
    inherited = inspect.getattr_static(base, "init_noise_sigma", None)

    def get(scheduler: Scheduler) -> Any:
        window = _window(scheduler)
        if not window.depth:
            window.multiplied = True
            if window.first:
                return 1.0
        if isinstance(inherited, property):
            return inherited.__get__(scheduler, base)
        return scheduler.__dict__["init_noise_sigma"]

    def set_(scheduler: Scheduler, value: Any) -> None:
        scheduler.__dict__["init_noise_sigma"] = value

    return property(get, set_)


def _segmented(base: type) -> type:
    """The cached same-named subclass of a scheduler class."""
    if base not in _CLASSES:
        methods = {
            name: _inside(name, method)
            for cls in reversed(base.__mro__)
            if cls.__module__.startswith("diffusers.schedulers") or cls is base
            for name, method in vars(cls).items()
            if inspect.isfunction(method) and not (name.startswith("__"))
        }
        parts = {
            **methods,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "timesteps": property(_timesteps, _set_timesteps),
            "init_noise_sigma": _noise_sigma(base),
            "_diffalign_base": base,
        }
        _CLASSES[base] = type(base)(base.__name__, (base,), parts)
    return _CLASSES[base]


@contextmanager
def segment(scheduler: Scheduler, window: Window) -> Iterator[Window]:
    """Within the block, ``scheduler`` is one segment; afterwards it is exactly what it was."""
    base, before = type(scheduler), dict(scheduler.__dict__)
    scheduler.__dict__["_diffalign_window"] = window
    scheduler.__class__ = _segmented(base)
    try:
        yield window
    finally:
        scheduler.__class__ = base
        scheduler.__dict__.clear()
        scheduler.__dict__.update(before)
