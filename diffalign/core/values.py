"""Values of options as text and as JSON, there and back."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def plain(value: object) -> Any:
    """``value`` as strict JSON data: infinity and "not a number" become text; ``converted`` reads
    it back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def alternatives(hint: object) -> tuple[object, ...]:
    """The members of a union, or the annotation itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def type_text(hint: object) -> str:
    """An annotation as people read it: "number or none", "eps | x0", "(number, number)"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else type_text(a) for a in args)})"
    if args:
        return " or ".join(type_text(a) for a in args)
    names: dict[object, str] = {
        float: "number",
        int: "integer",
        str: "text",
        bool: "true | false",
        type(None): "none",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def value_text(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return f"({','.join(map(value_text, value))})"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def split(text: str) -> list[str]:
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


def converted(value: Any, hint: object, where: str) -> Any:
    """``value`` as the annotated type: text is read as the type says, lists become tuples.

    Raises: ValueError, which begins with ``where``, for a value of another type.
    """
    kinds = alternatives(hint)
    if len(kinds) > 1:
        return _first_conversion(value, kinds, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}; got {value!r}.")
        return value
    if origin is tuple:
        return _tuple(value, args, where)
    if hint is str:
        if isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a text; got {value!r}.")
        return value.strip("\"'") if isinstance(value, str) else str(value)
    if hint is bool:
        if str(value).lower() not in FLAGS:
            raise ValueError(f"{where} must be true or false; got {value!r}.")
        return FLAGS[str(value).lower()]
    if hint in (int, float):
        try:
            return hint(value)
        except (TypeError, ValueError):
            kind = "an integer" if hint is int else "a number"
            raise ValueError(f"{where} must be {kind}; got {value!r}.") from None
    return value


def _first_conversion(value: Any, kinds: tuple[object, ...], where: str) -> Any:
    """``value`` as the first of the types that takes it."""
    absent = value is None or (isinstance(value, str) and value.lower() == "none")
    if absent and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return converted(value, kind, where)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _tuple(value: object, args: tuple[object, ...], where: str) -> tuple[object, ...]:
    items = _items(value) if isinstance(value, str) else value
    any_length = len(args) == 2 and args[1] is Ellipsis
    if not isinstance(items, list | tuple) or not (any_length or len(items) == len(args)):
        raise ValueError(f"{where} must be {len(args)} values like (0.2,5.0); got {value!r}.")
    kinds = args[:1] * len(items) if any_length else args
    return tuple(converted(item, kind, where) for item, kind in zip(items, kinds))


def _items(text: str) -> list[object]:
    """``"(1,2)"`` as JSON would read it, ``"(a,b)"`` and ``"a"`` as texts: names need no quotes and
    one entry no brackets."""
    try:
        items = json.loads(text.replace("(", "[").replace(")", "]"))
    except ValueError:
        items = [item.strip() for item in split(text.strip().removeprefix("(").removesuffix(")"))]
    return items if isinstance(items, list) else [items]
