"""Options: meaning, range, default and look-up of each stand once, beside the field.

A technique writes ``eta: float = option(0.0, "weight of the parallel part", low=0.0)`` or
``cap: float = auto("apg/cap", "largest norm of the difference")``. From these come the checks of
bad values, the values of options that the user left to the model, the help of the command line,
the tables of the README and the controls of the page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import (
    Any,
    Literal,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

from diffalign.core.errors import listed
from diffalign.core.values import alternatives, converted, type_text, value_text

T = TypeVar("T")
Saved = Literal["value", "tensors", "objects", "omitted"]

CALL = "call"
"""Source of an option that takes the pipeline's own guidance scale."""
FLOW = "flow"
"""Source of an option that says whether the scheduler's noise levels are those of a flow."""
REQUIRED: Any = object()
"""The default of an option that has none."""


@dataclass(frozen=True, slots=True)
class Option:
    """What a field of a technique says about itself; the last three come from the field."""

    # one clause in plain English, without the name, range and default
    meaning: str = ""
    # smallest and largest value, of each entry where there are several; an open end is no value
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    # whether infinity is a value
    infinite: bool = False
    choices: tuple[Any, ...] = ()
    # whether an empty text or tuple is refused
    nonempty: bool = False
    # what a slider shows of a range without ends
    usual: tuple[float, float] | None = None
    # CALL, FLOW, or the key of a preset such as "apg/cap"; "" for an option with its own default
    source: str = ""
    # how settings save it: as it is, tensors by a mark, objects by their class names, or not at all
    saved: Saved = "value"
    name: str = ""
    annotation: Any = Any
    # REQUIRED where there is none
    default: Any = REQUIRED

    @property
    def range(self) -> str:
        """The allowed values as text, "" where every value of the type is allowed."""
        if self.choices:
            return f"one of {listed(map(str, self.choices))}"
        if self.low == -math.inf and self.high == math.inf:
            return ""
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.low == -math.inf:
            return f"{'below' if self.open_high else 'at most'} {self.high:g}"
        ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"

    @property
    def span(self) -> tuple[float, float] | None:
        """Ends of a slider, None where no finite ones are known."""
        ends = (self.low, self.high)
        return self.usual or (ends if all(map(math.isfinite, ends)) else None)

    @property
    def type_text(self) -> str:
        """The type as people read it: "number or none", "eps | x0", "(number, number)"."""
        text = " | ".join(map(value_text, self.choices)) or type_text(self.annotation)
        optional = type(None) in alternatives(self.annotation)
        return f"{text} or none" if self.source and not optional else text

    @property
    def default_text(self) -> str:
        """The default as the command line reads it; "none" where it is looked up."""
        return "required" if self.default is REQUIRED else value_text(self.default)

    @property
    def readable(self) -> object:
        """The annotation of what users may write: None too where the value is looked up."""
        return self.annotation | None if self.source else self.annotation

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and (math.isfinite(value) or (self.infinite and value == math.inf))


class Facts(TypedDict, total=False):
    """The fields of ``Option`` that ``option`` and ``auto`` both take by name."""

    low: float
    high: float
    open_low: bool
    open_high: bool
    infinite: bool
    choices: tuple[object, ...]
    nonempty: bool
    usual: tuple[float, float] | None
    saved: Saved


class Source(Protocol):
    """Where ``auto`` options find their values; a ``Context`` is one."""

    def look_up(self, name: str, source: str, **options: object) -> object:
        """The value of the option ``name`` from ``source``."""
        ...


def option(
    default: object = dataclasses.MISSING,
    meaning: str = "",
    *,
    factory: Callable[[], object] | None = None,
    source: str = "",
    **facts: Unpack[Facts],
) -> Any:
    """A field with a default of its own, or a required one. ``facts``: fields of ``Option``."""
    spec = Option(meaning, source=source, **facts)
    # what settings do not save does not tell two techniques apart
    shown = spec.saved in ("value", "objects")
    if factory is not None:
        return field(default_factory=factory, metadata={"option": spec}, compare=shown, repr=shown)
    return field(default=default, metadata={"option": spec}, compare=shown, repr=shown)


def auto(source: str, meaning: str, **facts: Unpack[Facts]) -> Any:
    """A field whose value None is looked up: ``CALL``, or ``"technique/option"`` of the presets."""
    return option(None, meaning, source=source, **facts)


def derived(default: object) -> Any:
    """A field that is no option: ``resolve`` works its value out and ``completed`` sets it."""
    return field(default=default, init=False, repr=False, compare=False)


def options_of(cls: Callable[..., object]) -> dict[str, Option]:
    """Field name -> ``Option``, for the fields that users set, positional ones first."""
    return _options_of(cls)


@cache
def _options_of(cls: Any) -> dict[str, Option]:
    options = {}
    for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only)):
        if f.init:
            spec = f.metadata.get("option") or Option()
            hint = types_of(cls)[f.name]
            literal = next((a for a in alternatives(hint) if get_origin(a) is Literal), None)
            options[f.name] = dataclasses.replace(
                spec,
                choices=spec.choices or get_args(literal),
                name=f.name,
                annotation=hint,
                default=_default(f),
            )
    return options


def _default(f: dataclasses.Field[object]) -> object:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return REQUIRED if f.default is dataclasses.MISSING else f.default


def types_of(cls: Callable[..., object]) -> dict[str, object]:
    """Field name -> annotation of a technique's class."""
    return _types_of(cls)


@cache
def _types_of(cls: Callable[..., object]) -> dict[str, object]:
    return get_type_hints(cls)


def filled(technique: T, context: Source) -> T:
    """A copy whose ``auto`` options are looked up in ``context``, in the order of the fields.

    Conditions of presets may name the options before. ``context.sources`` then says where each
    value came from. Raises LookupError where no preset fits.
    """
    values: dict[str, object] = {}
    known: dict[str, object] = {}
    for name, spec in options_of(type(technique)).items():
        value = getattr(technique, name)
        if value is None and spec.source:
            value = context.look_up(name, spec.source, **known)
            values[name] = value = converted(value, spec.annotation, name)
        if value is not None:
            known[name] = value
    return _replaced(technique, values) if values else technique


def with_scale(technique: T, scale: float) -> T:
    """A copy whose guidance scale is ``scale`` where the user left it to the pipeline."""
    values = {
        name: scale
        for name, spec in options_of(type(technique)).items()
        if spec.source == CALL and getattr(technique, name) is None
    }
    return _replaced(technique, values) if values else technique


def completed(technique: T, **values: object) -> T:
    """A copy whose ``derived`` fields have these values."""
    copy = _replaced(technique, {})
    for name, value in values.items():
        object.__setattr__(copy, name, value)
    return copy


def _replaced(technique: T, values: Mapping[str, object]) -> T:
    copy: T = dataclasses.replace(technique, **values)  # type: ignore[type-var]
    return copy


def check_options(technique: object) -> None:
    """Raise ValueError or TypeError for the first option outside its type, range or choices.

    A list becomes a tuple where the option is one.
    """
    cls = type(technique)
    for name, spec in options_of(cls).items():
        value = getattr(technique, name)
        kinds = alternatives(spec.annotation)
        if value is None and (spec.source or type(None) in kinds):
            continue
        entries = next((kind for kind in kinds if get_origin(kind) is tuple), None)
        if isinstance(value, list) and entries is not None:
            value = tuple(value)
            object.__setattr__(technique, name, value)
        where = f"{cls.__name__}({name}=...)"
        if entries is not None and not (isinstance(value, str) and str in kinds):
            _check_entries(where, value, get_args(entries), spec)
        elif expected := _expected(value, kinds, spec):
            message = f"{where} must be {expected}{_or_none(spec)}; got {value!r}."
            raise _error(kinds, spec)(message)


def _check_entries(where: str, value: object, args: tuple[object, ...], spec: Option) -> None:
    any_length = len(args) == 2 and args[1] is Ellipsis
    texts = ", ".join(map(type_text, args))
    expected = "a tuple" if any_length else f"{len(args)} values ({texts})"
    if not isinstance(value, tuple):
        raise TypeError(f"{where} must be {expected}{_or_none(spec)}; got {value!r}.")
    if (spec.nonempty and not value) or not (any_length or len(value) == len(args)):
        expected = "at least one entry" if any_length else expected
        raise ValueError(f"{where} must have {expected}{_or_none(spec)}; got {value!r}.")
    for entry, hint in zip(value, args[:1] * len(value) if any_length else args):
        kinds = alternatives(hint)
        if expected := _expected(entry, kinds, spec):
            message = f"{where}: each entry must be {expected}; got {value!r}."
            raise _error(kinds, spec)(message)


def _expected(value: object, kinds: tuple[object, ...], spec: Option) -> str:
    """What one value of these types must be, "" where it is right."""
    if spec.choices:
        return "" if value in spec.choices else spec.range
    if isinstance(value, str) and str in kinds:
        return "" if value or not spec.nonempty else f"a text that is not empty ({spec.meaning})"
    if bool in kinds:
        return "" if isinstance(value, bool) else "True or False"
    if int in kinds or float in kinds:
        finite = "a number" if spec.range else "a number that is finite"
        kind = finite if float in kinds else "an integer"
        types = (int, float) if float in kinds else (int,)
        right = isinstance(value, types) and not isinstance(value, bool) and spec.holds(value)
        return "" if right else f"{kind} {spec.range}".rstrip()
    classes = [kind for kind in kinds if isinstance(kind, type) and get_origin(kind) is None]
    if Any in kinds or len(classes) < len(kinds) or isinstance(value, tuple(classes)):
        return ""
    return f"{listed(map(type_text, kinds))} ({spec.meaning})"


def _error(kinds: tuple[object, ...], spec: Option) -> type[Exception]:
    """Numbers, texts and choices have wrong values, everything else has wrong types."""
    simple = set(kinds) <= {int, float, str, type(None)}
    return ValueError if spec.choices or simple else TypeError


def _or_none(spec: Option) -> str:
    """The end of an error that says what None would mean."""
    if spec.source:
        whose = "the pipeline's own" if spec.source == CALL else "the model's own"
        return f", or None for {whose} value"
    return " or None" if type(None) in alternatives(spec.annotation) else ""
