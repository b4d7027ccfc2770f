"""GenEval's prompts: the official 553 and the grammar they are drawn from (Ghosh, Hajishirzi,
Schmidt 2023, arXiv:2310.11513).

Metadata are plain dictionaries in the official form: ``tag``, ``include`` (clauses with ``class``,
``count`` and perhaps ``color`` or ``position = [relation, index of an earlier clause]``),
``exclude`` (only for counting), ``prompt``. Standard library only.
"""

import json
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

_PREFIX = "a photo of "
_NUMBERS = {
    word: n
    for n, word in enumerate(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=2
    )
}
_RELATION = re.compile(rf"(.+?) ({'|'.join(RELATIONS)}) (.+)")
# Plurals a person would write where GenEval's rule ("es" after s, else "s") gives another word.
_ENGLISH = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
    "skis": "skis",
    "scissors": "scissors",
}


def data_folder() -> Traversable:
    """The packaged folder with the official files, byte for byte, and their LICENSE and NOTICE."""
    return files("diffalign.tasks.geneval") / "data"


@cache
def class_names() -> tuple[str, ...]:
    """The 80 class names in COCO's order. Three differ from COCO (``computer mouse``, ``tv
    remote``, ``computer keyboard``): map a detector's classes by index, never by name."""
    return tuple((data_folder() / "object_names.txt").read_text(encoding="utf-8").splitlines())


@cache
def _lines() -> tuple[str, ...]:
    return tuple(
        (data_folder() / "evaluation_metadata.jsonl").read_text(encoding="utf-8").splitlines()
    )


def prompts() -> list[dict[str, object]]:
    """The metadata of the 553 official prompts; the index in the list is the prompt id. Every call
    returns fresh dictionaries."""
    return [json.loads(line) for line in _lines()]


@cache
def _plurals() -> dict[str, str]:
    """Plural -> class: GenEval's mechanical plural ("benchs", "knifes", "sheeps") and the English
    one ("benches", "knives", "sheep")."""
    table: dict[str, str] = {}
    for name in class_names():
        table[_ENGLISH.get(name, name + ("es" if name.endswith(("s", "sh", "ch")) else "s"))] = name
        table[name + ("es" if name.endswith("s") else "s")] = name
    return table


def _thing(text: str) -> dict[str, object] | None:
    """The clause of "a/an [colour] class", else None.

    A bare "orange" is the fruit; before a class name it is the colour.
    """
    article, _, rest = text.partition(" ")
    if article not in ("a", "an"):
        return None
    if rest in class_names():
        return {"class": rest, "count": 1}
    color, _, name = rest.partition(" ")
    if color in COLORS and name in class_names() and name != "person":
        return {"class": name, "count": 1, "color": color}
    return None


def parse_prompt(text: str) -> dict[str, object] | None:
    """The metadata of a prompt in GenEval's grammar, or None if it is not in it.

    The six templates, with any of the 80 classes and 10 colours: "a photo of ..." + "a/an X" |
    "a/an X and a/an Y" | "two Xs" | "a/an C X" | "a/an X left of a/an Y" | "a/an C X and a/an D Y".
    For all 553 official prompts the result equals the official metadata. Beyond the official
    generator it accepts a missing "a photo of", capitals, a final full stop, extra blanks, either
    article, numbers up to ten, English plurals, and the same colour twice. Like the generator it
    refuses a coloured person and the same class twice (a clause looks at the most confident objects
    only, so two clauses of one class would look at the same object).
    """
    words = " ".join(text.lower().split()).removesuffix(".").rstrip().removeprefix(_PREFIX)

    def metadata(
        tag: str, include: list[dict[str, object]], exclude: list[dict[str, object]] | None = None
    ) -> dict[str, object]:
        return {
            "tag": tag,
            "include": include,
            **({"exclude": exclude} if exclude else {}),
            "prompt": text,
        }

    if one := _thing(words):
        return metadata("colors" if "color" in one else "single_object", [one])
    number, _, plural = words.partition(" ")
    if number in _NUMBERS and plural in _plurals():
        name, count = _plurals()[plural], _NUMBERS[number]
        return metadata(
            "counting", [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
        )
    left, conjunction, right = words.partition(" and ")
    relation = ""
    if not conjunction and (match := _RELATION.fullmatch(words)):
        left, relation, right = match.groups()
    first, second = _thing(left), _thing(right)
    if first is None or second is None or first["class"] == second["class"]:
        return None
    colored = ("color" in first) + ("color" in second)
    if relation and not colored:
        return metadata("position", [second, {**first, "position": [relation, 0]}])
    if not relation and colored != 1:
        return metadata("color_attr" if colored else "two_object", [first, second])
    return None
