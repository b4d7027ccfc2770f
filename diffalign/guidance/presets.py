"""Model-dependent defaults from a data file, each with the place it comes from."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    loaded: dict[str, list[dict[str, Any]]] = json.loads(files(__package__).joinpath("presets.json").read_text(encoding="utf-8"))
    return loaded


def preset(technique: str, option: str, facts: dict[str, Any]) -> tuple[Any, str]:
    """``(value, source)`` of the entry for ``option`` whose conditions all agree with ``facts``; the one with most conditions wins.

    Conditions name any of ``family``, ``pipeline``, ``scheduler``, ``steps`` and the technique's own options.
    Raises: LookupError when no entry fits.
    """
    entries = [entry for entry in _table().get(technique, []) if entry["option"] == option]
    fitting = [entry for entry in entries if all(facts.get(key) == value for key, value in entry["when"].items())]
    if not fitting:
        raise LookupError(f"No preset for {technique}:{option} fits {facts}.")
    best = max(fitting, key=lambda entry: len(entry["when"]))
    return best["value"], best["source"]
