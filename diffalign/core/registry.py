"""Techniques by name, for the command line, the app and saved settings. Importing a class never
needs it.

Plugins join by the entry point group ``diffalign.techniques``; each entry loads a technique class.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffalign.core.errors import nearest

# name on the command line -> where the class lives; modules are imported when first asked for
BUILTIN: dict[str, str] = {
    "cfg": "diffalign.guidance.cfg:CFG",
    "scheduled-cfg": "diffalign.guidance.scheduled_cfg:ScheduledCFG",
    "interval-cfg": "diffalign.guidance.interval_cfg:IntervalCFG",
    "adaptive-guidance": "diffalign.guidance.adaptive_guidance:AdaptiveGuidance",
    "nag": "diffalign.attention.nag.nag:NAG",
    "pladis": "diffalign.attention.pladis:PLADIS",
    "linear-ag": "diffalign.guidance.linear_ag:LinearAG",
    "dynamic-cfg": "diffalign.guidance.dynamic_cfg:DynamicCFG",
    "apg": "diffalign.guidance.apg:APG",
    "cfg-zero-star": "diffalign.guidance.cfg_zero_star:CFGZeroStar",
    "rescaled-cfg": "diffalign.guidance.rescaled_cfg:RescaledCFG",
    "tcfg": "diffalign.guidance.tcfg:TCFG",
    "beta-cfg": "diffalign.guidance.beta_cfg:BetaCFG",
    "magnitude-aware": "diffalign.guidance.magnitude_aware:MagnitudeAware",
    "cfg-plus-plus": "diffalign.guidance.cfg_plus_plus:CFGPlusPlus",
    "s2-guidance": "diffalign.guidance.s2_guidance:S2Guidance",
    "skip-layer-guidance": "diffalign.guidance.skip_layer_guidance:SkipLayerGuidance",
}

# not techniques of their own, so in no list, but named in saved settings
DOORS: dict[str, str] = {"diffusers-guider": "diffalign.seams.guiders_in:DiffusersGuider"}


@cache
def plugins() -> dict[str, type]:
    """Techniques that other packages register; a plugin may not take a built-in name."""
    found: dict[str, type] = {}
    for entry in entry_points(group="diffalign.techniques"):
        if entry.name in BUILTIN:
            raise ValueError(
                f"The plugin {entry.value!r} registers {entry.name!r}, which is taken; it must "
                "choose another name."
            )
        found[entry.name] = entry.load()
    return found


@cache
def techniques() -> dict[str, type]:
    """Every registered technique, plugins included: name -> class."""
    found: dict[str, type] = {}
    for name, target in BUILTIN.items():
        module, _, attribute = target.partition(":")
        found[name] = getattr(import_module(module), attribute)
    return found | plugins()


def name_of(technique: object) -> str:
    """The registered name of a technique, or its class name when it is not registered."""
    cls = type(technique)
    target = f"{cls.__module__}:{cls.__qualname__}"
    named = {known: name for name, known in {**BUILTIN, **DOORS}.items()} | {
        f"{c.__module__}:{c.__qualname__}": name for name, c in plugins().items()
    }
    return named.get(target, cls.__name__)


def make(name: str, options: Mapping[str, Any]) -> Any:
    """Build the technique ``name`` from ``options``, values as Python objects or as text; unknown
    names offer the nearest."""
    known = techniques()
    if name in DOORS:
        module, _, attribute = DOORS[name].partition(":")
        known = {**known, name: getattr(import_module(module), attribute)}
    if name not in known:
        raise ValueError(
            f"Unknown technique {name!r}. Nearest: {nearest(name, known)}. `diffalign techniques` "
            "lists all."
        )
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise ValueError(f"{name} has no option {key!r}. Nearest: {nearest(key, fields)}.")
        values[key] = _convert(value, hints[key], f"{name}:{key}")
    return cls(**values)


def parse(text: str) -> tuple[Any, ...]:
    """``"name:key=value,key=value+name2"`` -> techniques, in that order."""
    made = []
    for part in text.split("+"):
        name, _, rest = part.strip().partition(":")
        if not name.strip():
            raise ValueError(
                f"Technique {text!r} has an empty part; write name:key=value+name2. `diffalign "
                "methods` lists the names."
            )
        options: dict[str, str] = {}
        for item in filter(None, _split(rest)):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"Technique option {item!r} in {text!r} is not key=value.")
            options[key.strip().replace("-", "_")] = value.strip()
        made.append(make(name.strip().lower(), options))
    return tuple(made)


def to_config(technique: Any) -> dict[str, Any]:
    """A technique as JSON data: ``{"name": ..., fields}``; ``from_config`` is the inverse."""
    options = {
        f.name: _saved(f, getattr(technique, f.name))
        for f in dataclasses.fields(technique)
        if f.init and getattr(f.metadata.get("option"), "saved", "") != "omitted"
    }
    return {"name": name_of(technique), **options}


def _saved(field: dataclasses.Field[Any], value: Any) -> Any:
    """An option as JSON data; tensors leave a mark and objects their class name, which the
    technique refuses when read back."""
    if field.metadata.get("objects"):
        return [item if isinstance(item, str) else type(item).__name__ for item in value]
    return (
        "given as tensors" if value is not None and field.metadata.get("tensors") else plain(value)
    )


def plain(value: Any) -> Any:
    """``value`` as strict JSON data: infinity and "not a number" as text, which ``make`` reads
    back; containers likewise."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_config(config: Mapping[str, Any]) -> Any:
    return make(config["name"], {key: value for key, value in config.items() if key != "name"})


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([") - (char in ")]")
            if char == "," and depth == 0:
                parts.append(text[start:i])
                start = i + 1
    return [*parts, text[start:]]


def _items(text: str) -> Any:
    """``"(1,2)"`` as JSON would read it, ``"(a,b)"`` and ``"a"`` as texts: names need no quotes and
    one entry no brackets."""
    try:
        found = json.loads(text.replace("(", "[").replace(")", "]"))
    except ValueError:
        found = [item.strip() for item in _split(text.strip().removeprefix("(").removesuffix(")"))]
    return found if isinstance(found, list) else [found]


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type; text is read as the type says, lists become tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (
            isinstance(value, str) and value.lower() == "none" and type(None) in args
        ):
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(value, option, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, args))}; got {value!r}.")
    if origin is tuple:
        items = _items(value) if isinstance(value, str) else value
        inner = args[:1] * len(items) if len(args) == 2 and args[1] is Ellipsis else args
        if not isinstance(items, list | tuple) or len(inner) != len(items):
            raise ValueError(f"{where} must be {len(args)} values like (0.2,5.0); got {value!r}.")
        return tuple(_convert(item, kind, where) for item, kind in zip(items, inner))
    if hint is str:
        if isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a text; got {value!r}.")
        return value.strip("\"'") if isinstance(value, str) else str(value)
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise ValueError(f"{where} must be true or false; got {value!r}.")
        return known[str(value).lower()]
    if hint in (int, float):
        try:
            return hint(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where} must be {'an integer' if hint is int else 'a number'}; got {value!r}."
            ) from None
    return value
