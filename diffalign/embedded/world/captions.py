"""Sentences for scenes: GenEval's exact grammar, and paraphrases close to those of T2I-CompBench.

Grammar: Ghosh et al. (2023, arXiv:2310.11513). Paraphrases follow the wording of Huang et al.,
"T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image Generation"
(2023, arXiv:2307.06350): no prefix, other spatial phrases, proper plurals, synonyms.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from diffalign.embedded.world.vocabulary import NATIVE, NUMBERS, OPPOSITE, article, plural

SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": ("man", "woman", "girl", "boy", "child"), "bicycle": ("bike",),
    "motorcycle": ("motorbike",), "airplane": ("plane",), "couch": ("sofa",), "tv": ("television",),
    "cell phone": ("phone", "smartphone"), "cup": ("mug",), "handbag": ("bag", "purse"),
    "backpack": ("bag",), "refrigerator": ("fridge",), "donut": ("doughnut",),
    "dining table": ("table", "desk"), "computer mouse": ("mouse",),
    "computer keyboard": ("keyboard",), "tv remote": ("remote",), "potted plant": ("plant",),
    "sports ball": ("ball",), "boat": ("ship",), "bird": ("pigeon",), "tie": ("necktie",),
    "hair drier": ("hair dryer",),
}  # fmt: skip
"""Other words for an object; each belongs to one object except "bag"."""

PLURALS: dict[str, str] = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "bench": "benches",
    "knife": "knives", "sheep": "sheep", "skis": "skis", "toothbrush": "toothbrushes",
    "sandwich": "sandwiches", "couch": "couches", "broccoli": "broccoli",
    "computer mouse": "computer mice", "mouse": "mice", "scissors": "scissors",
}  # fmt: skip
"""Proper plurals that the mechanical rule gets wrong."""

PREFIXES = (
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "a photograph of ",
    "an emoji of ",
    "a photo of ",
)
BESIDE = (" next to ", " beside ", " near ", " on side of ", " with ", " and ")
SIDES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "on the left of", "to the left of", "on the left side of"),
    "right of": ("right of", "on the right of", "to the right of", "on the right side of"),
    "above": ("above", "on top of", "on the top of", "over"),
    "below": ("below", "under", "beneath", "on the bottom of"),
}


@dataclass(frozen=True)
class Group:
    """Objects of one name and one colour."""

    name: str
    # 0: a plural without a number
    count: int = 1
    # ``NATIVE``: the caption names no colour
    colour: str = NATIVE


def _phrase(group: Group, name: str, many: str) -> str:
    colour = "" if group.colour == NATIVE else f"{group.colour} "
    if group.count == 0:
        return f"{colour}{many}"
    return article(colour + name) if group.count == 1 else f"{NUMBERS[group.count]} {colour}{many}"


def geneval(groups: tuple[Group, ...], relation: str | None) -> str:
    """The sentence GenEval's generator writes: "a photo of ..."; with a relation the first group is
    the subject, the second the target."""
    phrases = [_phrase(group, group.name, plural(group.name)) for group in groups]
    return "a photo of " + (f" {relation} " if relation else " and ").join(phrases)


def paraphrase(rng: random.Random, groups: tuple[Group, ...], relation: str | None) -> str:
    """A free wording of the same facts. Draws from ``rng``; at most 16 words."""
    phrases = []
    for group in groups:
        name = group.name
        if name in SYNONYMS and rng.random() < 0.4:
            name = rng.choice(SYNONYMS[name])
        phrase = _phrase(group, name, PLURALS.get(name, plural(name)))
        if group.count == 1 and rng.random() < 0.05:
            phrase = "one " + phrase.split(" ", 1)[1]
        phrases.append(phrase)
    prefix = rng.choice(PREFIXES)
    if relation is not None:
        if rng.random() < 0.4:
            relation, phrases = OPPOSITE[relation], phrases[::-1]
        return f"{prefix}{phrases[0]} {rng.choice(SIDES[relation])} {phrases[1]}"
    if len(phrases) > 1 and rng.random() < 0.5:
        phrases = phrases[::-1]
    if len(phrases) == 3:
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    joint = rng.choice(BESIDE) if all(group.count == 1 for group in groups) else " and "
    return prefix + joint.join(phrases)


def words(sentence: str) -> list[str]:
    """Split like the tokenizer: lower-case words, commas on their own."""
    return sentence.lower().replace(",", " , ").split()
