"""Public attributes of the pipeline that the engine replaces while it guides.

While our guidance runs, the pipeline holds a placeholder as its scale and neutral values of its own
guidance options. A user's callback reads and writes these attributes: there, and after the call,
they hold what the user gave, and what a callback changes takes effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffalign.core import UnsupportedModel
from diffalign.core.errors import warn_once
from diffalign.core.option import CALL, options_of
from diffalign.seams import swap
from diffalign.seams.denoiser.branches import Ended
from diffalign.seams.denoiser.tap import Generation


class Published:
    """The replaced attributes of one generation."""

    def __init__(self, generation: Generation) -> None:
        self.generation, self.pipe = generation, generation.pipe
        plan = generation.plan
        names = [*generation.family.gates, *(o.name for o in generation.family.options)]
        replaced = names if plan.guidances and plan.opened else []
        # argument -> the user's value, for those that the engine replaces
        self.values = {
            name: plan.values[name] for name in replaced if plan.values.get(name) is not None
        }
        # what the pipeline keeps after the call
        self.given = dict(self.values)
        # argument -> the engine's value
        self.engine = {name: plan.arguments[name] for name in self.values if name in plan.arguments}
        for name in generation.family.gates:
            self._show(name)
        above = generation.family.on_above
        # scales of calls that guide nothing
        self.off = {gate for gate in generation.family.gates if self.values.get(gate, 9.0) <= above}

    def _show(self, gate: str) -> None:
        """Where the user's scale says "off" and the technique guides, callbacks read its scale:
        they choose rows by it, and both branches are there."""
        plan, family = self.generation.plan, self.generation.family
        scale = next(iter(plan.guidances.values())).asked_scale if plan.guidances else None
        if scale is None or plan.free:  # it follows the user's
            return
        if gate in self.values and self.values[gate] <= family.on_above:
            self.values[gate] = max(family.native(scale), family.placeholder)

    def call(self, callback: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a user's callback with the user's values in place, outside the session."""
        present = [name for name in self.engine if f"_{name}" in vars(self.pipe)]
        for name in present:
            setattr(self.pipe, f"_{name}", self.values[name])
        try:
            return swap.outside(callback, args, kwargs)
        finally:
            for name in present:
                self._take(name, getattr(self.pipe, f"_{name}"))

    def _take(self, name: str, value: Any) -> None:
        """What a callback left in an attribute; the engine's own value goes back in."""
        family = self.generation.family
        changed = bool(value != self.values[name])
        if changed:
            self.values[name] = self.given[name] = value
        if name not in family.gates:
            self.generation.plan.options[name] = value
        elif changed and value <= family.on_above:
            # the pipeline stops guiding and runs the conditional branch alone from here
            self.generation.way = Ended()
            del self.engine[name]
            return
        elif changed and name in self.off:
            raise UnsupportedModel(
                f"A callback set {name} to {value}, and the call began without guidance. Ask for "
                "guidance in the call too."
            )
        elif changed and family.live_scale:
            self._rescale(name, family.scale(value))
        setattr(self.pipe, f"_{name}", self.engine[name])

    def _rescale(self, gate: str, scale: float) -> None:
        plan, family = self.generation.plan, self.generation.family
        guidance: Any
        for denoiser, guidance in plan.guidances.items():
            index = min(family.denoisers.index(denoiser), len(family.gates) - 1)
            if family.gates[index] != gate:
                continue
            specs = options_of(type(guidance))
            free = [name for name in plan.free if specs[name].source == CALL]
            if free:
                values = dict.fromkeys(free, scale)
                plan.guidances[denoiser] = dataclasses.replace(guidance, **values)
            else:
                warn_once(
                    f"A callback changed {gate}, and {type(guidance).__name__} has a scale of its "
                    "own; that one is used. Leave it out to follow the pipeline's."
                )

    def restore(self) -> None:
        """After the call, or an exception: the user's values."""
        for name in self.engine:
            if f"_{name}" in vars(self.pipe):
                setattr(self.pipe, f"_{name}", self.given[name])


@contextmanager
def published(generation: Generation) -> Iterator[None]:
    """The user's callbacks run outside the session and see their own values."""
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    state, arguments = Published(generation), generation.plan.arguments

    def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return state.call(original, args, kwargs)

    objects: dict[Any, tuple[str, swap.Handler]] = {}
    for name in ("callback_on_step_end", "callback"):
        callback = arguments.get(name)
        # pipelines look at the class of these
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            objects[callback] = ("__call__", handler)
        elif callback is not None:
            arguments[name] = _wrapped(callback, state)
    try:
        with swap.intercepted(objects):
            yield
    finally:
        state.restore()


def _wrapped(callback: Callable[..., Any], state: Published) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return state.call(callback, args, kwargs)

    return call
