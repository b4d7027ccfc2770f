"""Everything that is known of each model family; one file per family.

Files are found by themselves: a new family needs no entry anywhere. Diffusers' classes are known by
name only, and importing this room loads neither torch nor diffusers.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.resources import files

from diffalign.core.errors import UnsupportedModel, nearest
from diffalign.families.family import Family

__all__ = [
    "FAMILIES",
    "Family",
    "block_streams",
    "families",
    "family_named",
    "family_of",
    "modular_families",
    "refusals",
]


@cache
def families() -> tuple[Family, ...]:
    """Every family of the files beside this one, in the order of files and lines."""
    values: dict[int, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        names = vars(import_module(f"{__name__}.{module.name}"))
        values |= {id(value): value for value in names.values() if isinstance(value, Family)}
    return tuple(values.values())


def _by_class(classes: Iterator[tuple[str, Family]]) -> dict[str, Family]:
    table: dict[str, Family] = {}
    for name, family in classes:
        if name in table:
            raise ValueError(
                f"{name} stands in two families, {table[name].name} and {family.name}; give each "
                "its own pipelines=... and modular=..."
            )
        table[name] = family
    return table


FAMILIES: dict[str, Family] = _by_class(
    (name, family) for family in families() for name in family.pipelines
)
"""Exact name of a pipeline class -> its family."""


@cache
def modular_families() -> dict[str, Family]:
    """Exact name of a modular pipeline class -> its family."""
    return _by_class((name, family) for family in families() for name in family.modular)


@cache
def family_named(name: str) -> Family:
    """The first family of that name: those of one name describe the same models.

    Raises ``LookupError`` where there is none.
    """
    for family in families():
        if family.name == name:
            return family
    raise LookupError(f"no model family is named {name!r}")


@cache
def block_streams() -> dict[str, tuple[str, ...]]:
    """Class of a transformer block -> parameters of its forward that it returns, in that order."""
    return {name: streams for family in families() for name, streams in family.blocks.items()}


@cache
def refusals() -> dict[str, str]:
    """Exported pipeline classes without a family: class name -> reason."""
    table: dict[str, str] = json.loads(files(__package__).joinpath("refusals.json").read_text())
    return table


def family_of(cls: type) -> Family:
    """The family of a pipeline class; a user's own subclass inherits it.

    Raises ``UnsupportedModel`` with the specific reason.
    """
    for base in cls.__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
        if base.__name__ in modular_families():
            raise UnsupportedModel(
                f"{base.__name__} is a modular pipeline, where techniques act as guiders: "
                "pipe.update_components(guider=da.guider(technique, pipe))."
            )
        if base.__name__ in refusals():
            raise UnsupportedModel(f"{base.__name__} is not supported: {refusals()[base.__name__]}")
    raise UnsupportedModel(
        f"{cls.__name__} is not a pipeline class that diffalign knows. Nearest: "
        f"{nearest(cls.__name__, FAMILIES)}. A subclass of one of those inherits its family."
    )
