"""Model-dependent defaults of attention techniques from a data file, each with the place it comes
from."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from diffalign.core import Context


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    loaded: dict[str, list[dict[str, Any]]] = json.loads(
        files(__package__).joinpath("presets.json").read_text(encoding="utf-8")
    )
    return loaded


def preset(technique: str, option: str, context: Context) -> tuple[float, str] | None:
    """``(value, source)`` of the entry that has ``option`` and agrees with ``context`` in most
    conditions; a later entry wins a tie.

    None when no entry has it.
    """
    facts = {"family": context.family, "pipeline": context.pipeline, "flow": context.flow}
    best: dict[str, Any] | None = None
    for entry in _table().get(technique, []):
        fits = option in entry and all(facts[key] == value for key, value in entry["when"].items())
        if fits and (best is None or len(entry["when"]) >= len(best["when"])):
            best = entry
    return None if best is None else (best[option], best["source"])
