"""Model-dependent defaults, each with the place it comes from.

Three sources: the user's own files, the table that ships (``presets.json``), and what a family's
file says about itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from diffalign.core.errors import warn_once
from diffalign.core.types import Json

VARIABLE = "DIFFALIGN_PRESETS"
"""Environment variable with the paths of preset files, separated as ``PATH`` is.

``diffalign calibrate`` writes such files.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One default of one technique."""

    # name of the option
    option: str
    value: object
    # where the value was published or measured
    source: str
    # facts that must hold: family, pipeline, scheduler, steps, flow, model, or other options
    when: Mapping[str, object] = field(default_factory=dict)


Table = dict[str, tuple[Entry, ...]]


@cache
def _shipped() -> Table:
    return _table(json.loads(files(__package__).joinpath("presets.json").read_text("utf-8")))


def _table(data: Mapping[str, Iterable[Json]]) -> Table:
    return {name: tuple(Entry(**entry) for entry in entries) for name, entries in data.items()}


def _users() -> list[Table]:
    """The files of ``DIFFALIGN_PRESETS``, read anew at every call."""
    return [_read(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _read(path: str) -> Table:
    """One preset file. Raises ValueError naming the variable when it is missing or malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            table = _table(json.load(file))
        for entry in (entry for entries in table.values() for entry in entries):
            texts = isinstance(entry.option, str) and isinstance(entry.source, str)
            if not (texts and isinstance(entry.when, dict)):
                raise TypeError("option and source must be texts, when an object")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"The environment variable {VARIABLE} names {path!r}, which is not a readable preset "
            f"file ({type(error).__name__}: {error}). Correct or unset it; `diffalign calibrate` "
            "writes such files."
        ) from error
    return table


def preset(
    technique: str, option: str, facts: Mapping[str, object], defaults: Iterable[Entry] = ()
) -> tuple[object, str]:
    """``(value, source)`` of the entry for ``option`` whose conditions all agree with ``facts``.

    ``facts``: see ``Context.facts``; a fact that is a function is asked only when everything else
    agrees. ``defaults``: the family's own entries. An entry of the user's files wins over all
    others, an earlier file over a later one; within a file the entry with most conditions. A
    family's entry counts as one with a condition more.
    Raises: LookupError when no entry fits, ValueError for a preset file that cannot be used.
    """
    for table in _users():
        entries = [e for e in table.get(technique, ()) if e.option == option and _fits(e, facts)]
        if entries:
            best = max(entries, key=lambda entry: len(entry.when))
            return best.value, best.source
    _say_what_does_not_apply(technique, option, facts)
    ranked = [(len(e.when), e) for e in _shipped().get(technique, ())]
    ranked += [(len(e.when) + 1, e) for e in defaults]
    fitting = [(rank, e) for rank, e in ranked if e.option == option and _fits(e, facts)]
    if not fitting:
        known = {name: value for name, value in facts.items() if not callable(value)}
        raise LookupError(f"No preset for {technique}:{option} fits {known}.")
    best = max(fitting, key=lambda item: item[0])[1]
    return best.value, best.source


def _say_what_does_not_apply(technique: str, option: str, facts: Mapping[str, object]) -> None:
    """A warning where an option was calibrated for this model, but with other weights."""
    calibrated = [e for table in (*_users(), _shipped()) for e in table.get(technique, ())]
    for entry in calibrated:
        if entry.option != option or "model" not in entry.when:
            continue
        others = {name: value for name, value in entry.when.items() if name != "model"}
        if _agree(others, facts) and not _equal(entry.when["model"], facts.get("model")):
            warn_once(
                f"{technique}: the {option} that was calibrated for this model does not apply, "
                f"since the weights are others ({entry.source}). Calibrate it again, or give "
                f"{option}=... yourself."
            )


def _fits(entry: Entry, facts: Mapping[str, object]) -> bool:
    """Whether every condition holds; facts that must be computed come last."""
    return _agree(entry.when, facts)


def _agree(conditions: Mapping[str, object], facts: Mapping[str, object]) -> bool:
    ordered = sorted(conditions.items(), key=lambda item: callable(facts.get(item[0])))
    return all(_equal(value, facts.get(name)) for name, value in ordered)


def _equal(value: object, fact: object) -> bool:
    known = fact() if callable(fact) else fact
    if isinstance(value, float) and isinstance(known, int | float):
        return math.isclose(value, known)
    return bool(value == known)
