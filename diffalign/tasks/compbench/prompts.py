"""The validation prompts of T2I-CompBench++, their published parses, and its file names (Huang et
al. 2023, arXiv:2307.06350; 2025, doi 10.1109/TPAMI.2025.3531907).

Every category has 300 prompts. The parses were made once with spaCy 3.6.1 and travel with the
prompts, because another version parses some of them differently. Standard library only.
"""

import json
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "3d_spatial",
    "numeracy",
    "non_spatial",
    "complex",
)
IMAGES = 10
"""Images of a prompt in the published protocol."""

PERSONS = ("girl", "boy", "man", "woman")
"""Nouns that the rules read as "person"."""


def data_folder() -> Traversable:
    """The packaged folder with the official files, byte for byte, and their LICENSE and NOTICE."""
    return files("diffalign.tasks.compbench") / "data"


def _lines(name: str) -> list[str]:
    return (data_folder() / name).read_text(encoding="utf-8").splitlines()


@cache
def prompts(category: str) -> tuple[str, ...]:
    """The 300 prompts of a category, as they are.

    Raises: ValueError for another category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}; got {category!r}.")
    return tuple(_lines(f"{category}_val.txt"))


@cache
def _parses() -> dict[tuple[str, int], dict[str, object]]:
    rows = (json.loads(line) for line in _lines("parses.jsonl"))
    return {(row["category"], row["index"]): row for row in rows}


def parse_of(category: str, index: int) -> dict[str, object]:
    """The published parse of a prompt: ``noun_phrases`` (color, shape, texture, complex),
    ``nouns`` (spatial, 3d_spatial), ``objects`` and ``counts`` (numeracy), ``no_adj`` and
    ``spatial_objects`` (complex). A prompt of non_spatial has none, only its text."""
    row = {"category": category, "index": index, "prompt": prompts(category)[index]}
    return dict(_parses().get((category, index), row))


@cache
def _key(prompt: str) -> str:
    """The prompt as the official mixture of ``complex`` compares it."""
    return prompt.lower().partition(".")[0]


@cache
def _listed(name: str) -> frozenset[str]:
    return frozenset(_key(line) for line in _lines(f"complex_val_{name}.txt"))


def mixture(prompt: str) -> tuple[str, ...]:
    """The scores that are averaged for a prompt of ``complex``: ``attribute`` with ``spatial``,
    with ``clip``, or with both."""
    if _key(prompt) in _listed("spatial"):
        return ("spatial", "attribute")
    if _key(prompt) in _listed("action"):
        return ("clip", "attribute")
    return ("spatial", "clip", "attribute")


@cache
def _names() -> tuple[frozenset[str], dict[str, str]]:
    """The objects of numeracy, and their plurals."""
    pairs = [line.split(" - ") for line in _lines("new_objects.txt") if line.strip()]
    return (
        frozenset(pair[0].strip() for pair in pairs),
        {pair[1].strip(): pair[0].strip() for pair in pairs},
    )


NUMBERS = {
    word: n
    for n, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight"), start=1
    )
} | {"a": 1, "an": 1}


def counted(prompt: str) -> tuple[list[str], list[int]]:
    """The objects that a prompt of numeracy counts, as singulars, and how many of each.

    After each article or number up to eight the next two words, or the next one, are looked up in
    the published list of names. For all 300 prompts the result equals the published parse.
    """
    singulars, plurals = _names()
    words = re.findall(r"[a-z0-9'-]+", prompt.lower())
    objects, counts = [], []
    for place, word in enumerate(words):
        if word not in NUMBERS:
            continue
        for size in (1, 2):
            name = " ".join(words[place + 1 : place + 1 + size])
            if name in plurals or name in singulars:
                objects.append(plurals.get(name, name))
                counts.append(NUMBERS[word])
                break
    return objects, counts


def file_name(prompt: str, number: int) -> str:
    """The official name of an image; ``number`` counts through the category, ten to a prompt."""
    return f"{prompt}_{number:06d}.png"


def read_name(name: str) -> tuple[str, int]:
    """Prompt and number of an official file name.

    Raises: ValueError for a name of another form.
    """
    match = re.fullmatch(r"([^_]*)_(?:.*_)?(\d+)\.png", name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a file name of T2I-CompBench, like 'a red cat_000010.png'."
        )
    return match[1], int(match[2])
