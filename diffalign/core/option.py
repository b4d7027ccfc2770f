"""Options: meaning, range, default and look-up of each stand once, beside the field.

A technique writes ``eta: float = option(0.0, "weight of the parallel part", low=0.0)`` or
``cap: float = auto("apg/cap", "largest norm of the difference")``. From these come the checks of
bad values, the values of options that the user left to the model, the help of the command line,
the tables of the README and the controls of the page.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from diffalign.core.errors import listed

CALL = "call"
"""Source of an option that takes the pipeline's own guidance scale."""


@dataclass(frozen=True, slots=True)
class Option:
    """What a field of a technique says about itself."""

    # one clause in plain English, without the name, range and default
    meaning: str
    # smallest and largest value; an open end is not allowed itself
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    # whether infinity is a value
    infinite: bool = False
    choices: tuple[Any, ...] = ()
    # CALL, or the key of a preset such as "apg/cap"; "" for an option with a default of its own
    source: str = ""
    # how settings save it: as it is, tensors by a mark, objects by their class names, or not at all
    saved: Literal["value", "tensors", "objects", "omitted"] = "value"

    @property
    def range(self) -> str:
        """The allowed values as text, "" where every value of the type is allowed."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        if self.low == -math.inf and self.high == math.inf:
            return ""
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.low == -math.inf:
            return f"{'below' if self.open_high else 'at most'} {self.high:g}"
        ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and (math.isfinite(value) or (self.infinite and value == math.inf))


def option(
    default: Any = dataclasses.MISSING, meaning: str = "", *, factory: Any = None, **facts: Any
) -> Any:
    """A field with a default of its own, or a required one. ``facts``: fields of ``Option``."""
    spec = Option(meaning, **facts)
    # what settings do not save does not tell two techniques apart
    shown = spec.saved in ("value", "objects")
    settings: dict[str, Any] = {"metadata": {"option": spec}, "compare": shown, "repr": shown}
    if factory is not None:
        return field(default_factory=factory, **settings)
    return field(default=default, **settings)


def auto(source: str, meaning: str, **facts: Any) -> Any:
    """A field whose value None is looked up: ``CALL``, or ``"technique/option"`` of the presets."""
    return field(default=None, metadata={"option": Option(meaning, source=source, **facts)})


def options_of(cls: type) -> dict[str, Option]:
    """Field name -> ``Option``, for the fields that users set, in their order."""
    return _options(cls)


def types_of(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a technique's class."""
    return _types(cls)


@cache
def _options(cls: type) -> dict[str, Option]:
    return {f.name: f.metadata.get("option", Option("")) for f in dataclasses.fields(cls) if f.init}


@cache
def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_options(technique: Any) -> None:
    """Raise ValueError or TypeError for the first option outside its type, range or choices."""
    cls = type(technique)
    for name, spec in options_of(cls).items():
        _check(cls.__name__, name, getattr(technique, name), types_of(cls)[name], spec)


def _check(owner: str, name: str, value: Any, hint: Any, spec: Option) -> None:
    allowed = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and (spec.source or type(None) in allowed):
        return
    where = f"{owner}({name}=...)"
    none = ", or None for the model's own value" if spec.source else ""
    if spec.choices:
        if value not in spec.choices:
            raise ValueError(f"{where} must be one of {listed(spec.choices)}{none}; got {value!r}.")
        return
    if bool in allowed:
        if not isinstance(value, bool):
            raise TypeError(f"{where} must be True or False; got {value!r}.")
        return
    if set(allowed) - {type(None)} <= {int, float}:
        kind = "an integer" if float not in allowed else "a number"
        numeric = int if float not in allowed else (int, float)
        good = isinstance(value, numeric) and not isinstance(value, bool)
        if not good or not spec.holds(value):
            limits = f" {spec.range}" if spec.range else " that is finite"
            raise ValueError(f"{where} must be {kind}{limits}{none}; got {value!r}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def filled(technique: Any, context: Any) -> Any:
    """A copy whose ``auto`` options are looked up in ``context``, in the order of the fields.

    ``context.sources`` then says where each value came from. Raises LookupError where no preset
    fits.
    """
    values = {
        name: context.look_up(name, spec.source)
        for name, spec in options_of(type(technique)).items()
        if spec.source and getattr(technique, name) is None
    }
    return dataclasses.replace(technique, **values) if values else technique


def with_scale(technique: Any, scale: float) -> Any:
    """A copy whose guidance scale is ``scale`` where the user left it to the pipeline."""
    values = {
        name: scale
        for name, spec in options_of(type(technique)).items()
        if spec.source == CALL and getattr(technique, name) is None
    }
    return dataclasses.replace(technique, **values) if values else technique
