"""Model-dependent defaults from data files, each with the place it comes from: the user's own, then
those that ship."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from diffalign.core import Context
from diffalign.guidance.linear_policy import model_hash

VARIABLE = "DIFFALIGN_PRESETS"
"""Environment variable with the paths of preset files, separated as ``PATH`` is; ``diffalign
calibrate`` writes such files."""

Table = dict[str, list[dict[str, Any]]]


@cache
def _shipped() -> Table:
    loaded: Table = json.loads(
        files(__package__).joinpath("presets.json").read_text(encoding="utf-8")
    )
    return loaded


def _own() -> list[Table]:
    """The files of ``DIFFALIGN_PRESETS``, read anew at every call."""
    return [_read(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _read(path: str) -> Table:
    """One preset file.

    Raises ValueError naming the variable when it is missing or not a preset file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table: Table = json.load(file)
        for entry in (entry for entries in table.values() for entry in entries):
            if not (
                isinstance(entry["option"], str)
                and isinstance(entry["when"], dict)
                and isinstance(entry["source"], str)
            ):
                raise TypeError("option and source must be texts, when an object")
            entry["value"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The environment variable {VARIABLE} names {path!r}, which is not a readable preset "
            f"file ({type(error).__name__}: {error}). "
            "Correct or unset it; `diffalign calibrate` writes such files."
        ) from error
    return table


def facts_of(context: Context, **options: Any) -> dict[str, Any]:
    """What conditions may name: the call, the model, and the technique's own ``options``. The model
    is hashed only when asked."""
    module = context.module
    return {
        "family": context.family,
        "pipeline": context.pipeline,
        "scheduler": context.scheduler,
        "steps": context.steps,
        "scale": context.scale,
        "in_channels": getattr(getattr(module, "config", None), "in_channels", None),
        "model": lambda: model_hash(module) if module is not None else None,
    } | options


def preset(technique: str, option: str, facts: Mapping[str, Any]) -> tuple[Any, str]:
    """``(value, source)`` of the entry for ``option`` whose conditions all agree with ``facts``.

    An entry of the user's files wins over those that ship, an earlier file over a later one; within
    a file the entry with most conditions. Conditions name any of ``facts_of``. A fact that is a
    function is asked only when everything else agrees.
    Raises: LookupError when no entry fits, ValueError for a preset file that cannot be used.
    """
    for table in (*_own(), _shipped()):
        entries = [
            entry
            for entry in table.get(technique, [])
            if entry["option"] == option and _agrees(entry["when"], facts)
        ]
        if entries:
            best = max(entries, key=lambda entry: len(entry["when"]))
            return best["value"], best["source"]
    raise LookupError(f"No preset for {technique}:{option} fits {dict(facts)}.")


def _agrees(when: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether every condition holds; facts that must be computed come last."""
    return all(
        _equal(value, facts.get(key))
        for key, value in sorted(when.items(), key=lambda item: callable(facts.get(item[0])))
    )


def _equal(value: Any, fact: Any) -> bool:
    found = fact() if callable(fact) else fact
    return (
        math.isclose(value, found)
        if isinstance(value, float) and isinstance(found, int | float)
        else bool(value == found)
    )
