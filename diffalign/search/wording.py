"""What a prompt states, whether another prompt states it too, and other wordings of it.

Facts are things with their number and colours, and relations between two things. They are read by
rules from plain English noun phrases; the tables below hold general words and the names of the
embedded world.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from diffalign.embedded.world.captions import PLURALS, SIDES
from diffalign.embedded.world.captions import SYNONYMS as WORLD_SYNONYMS
from diffalign.embedded.world.vocabulary import COLOURS as WORLD_COLOURS
from diffalign.embedded.world.vocabulary import article

COLOURS = frozenset(WORLD_COLOURS) | {
    "gray", "grey", "gold", "golden", "silver", "beige", "turquoise", "cyan", "magenta", "violet",
    "teal", "navy", "maroon",
}  # fmt: skip
NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
ARTICLES = {"a": 1, "an": 1, "the": None}
LINKS = {
    "and", "or", "with", "of", "is", "are", "that", "which", "who", "it", "its", "there", "in",
    "at", "by", "for", "to", "from", "into", "as", "on",
}  # fmt: skip
"""Words that end a noun phrase."""
COPULAS = frozenset({"is", "are"})
MEDIUM = frozenset({"photo", "photograph", "picture", "image"})
"""What the result is anyway; it may be named or not."""
LEADS = ("a photo of ", "a picture of ", "an image of ", "a photograph of ", "")
TAILS = ("high quality", "sharp focus", "centered", "clear and simple", "well lit", "detailed")
"""Additions of the fixed-template kind."""
RELATIONS: dict[str, tuple[str, ...]] = {
    **SIDES,
    "below": (*SIDES["below"], "underneath"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "next to": ("next to", "beside", "near", "by the side of", "on side of"),
    "inside": ("inside of", "inside"),
}
OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
    "next to": "next to",
}
SYNONYMS: tuple[tuple[str, str], ...] = (
    *(
        (name, other)
        for name, others in WORLD_SYNONYMS.items()
        for other in others
        # single words that mean the same thing: a girl is a person, but not every person a girl
        if name not in ("person", "bird") and " " not in name + other and other != "bag"
    ),
    ("car", "automobile"),
    ("rabbit", "bunny"),
    ("child", "kid"),
    ("street", "road"),
    ("stone", "rock"),
    ("house", "home"),
    ("big", "large"),
    ("small", "little"),
    ("shiny", "glossy"),
)
CANONICAL = {other: name for name, other in SYNONYMS}
SINGULARS = {many: one for one, many in PLURALS.items()} | {"feet": "foot", "geese": "goose"}
_PHRASES = sorted(
    ((phrase, name) for name, phrases in RELATIONS.items() for phrase in phrases),
    key=lambda pair: -len(pair[0]),
)
_TOKEN = re.compile(
    "|".join(rf"\b{re.escape(phrase)}\b" for phrase, _ in _PHRASES) + r"|[\w'-]+|[^\w\s]"
)
_RELATION = dict(_PHRASES)


@dataclass(frozen=True, slots=True)
class Thing:
    """A noun phrase."""

    # nouns and adjectives but colours, singular, synonyms replaced
    words: frozenset[str]
    # 0 for several without a number
    count: int
    colours: frozenset[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a prompt states."""

    things: tuple[Thing, ...]
    # (subject, relation, object): indices of things, the relation in one of its two directions
    relations: frozenset[tuple[int, str, int]]


@dataclass(slots=True)
class _Reader:
    """The noun phrase that is being read, and what was read before."""

    things: list[Thing] = field(default_factory=list)
    relations: set[tuple[int, str, int]] = field(default_factory=set)
    run: list[str] = field(default_factory=list)
    count: int | None = None
    definite: bool = False
    copula: bool = False
    # the subject and the relation whose object comes next
    open: tuple[int, str] | None = None

    def close(self) -> None:
        """End the noun phrase."""
        run, self.run = self.run, []
        if not run:
            return
        if self.copula and self.things and COLOURS.issuperset(run):
            self.things[-1] = _with_colours(self.things[-1], run)
        else:
            self._name(run)
        self.count, self.definite, self.copula = None, False, False

    def _name(self, run: list[str]) -> None:
        nouns = [word for word in run if word not in COLOURS]
        colours = frozenset(run if nouns else run[:-1]) & COLOURS
        nouns = nouns or run[-1:]  # an orange orange
        words = frozenset(CANONICAL.get(word, word) for word in map(singular, nouns))
        if words <= MEDIUM:
            return
        same = [i for i, thing in enumerate(self.things) if thing.words == words]
        if self.definite and len(same) == 1:
            index = same[0]
            self.things[index] = _with_colours(self.things[index], colours)
        else:
            number = int(singular(nouns[-1]) == nouns[-1]) if self.count is None else self.count
            index = len(self.things)
            self.things.append(Thing(words, number, colours))
        if self.open is not None:
            subject, relation = self.open
            self.relations.add(_directed(subject, relation, index))
            self.open = None


def _with_colours(thing: Thing, colours: object) -> Thing:
    more: frozenset[str] = frozenset(colours)  # type: ignore[call-overload]
    return Thing(thing.words, thing.count, thing.colours | more)


def _directed(subject: int, relation: str, target: int) -> tuple[int, str, int]:
    """One spelling of "a left of b" and "b right of a"."""
    opposite = OPPOSITES.get(relation, relation)
    if relation == opposite:
        return (min(subject, target), relation, max(subject, target))
    if relation > opposite:
        return (target, opposite, subject)
    return (subject, relation, target)


def singular(word: str) -> str:
    """The singular of a noun, by table and by rule; other words come back as they are."""
    if word in SINGULARS:
        return SINGULARS[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "sses", "xes", "zes")) else word[:-1]


def facts(prompt: str) -> Facts:
    """What a prompt states."""
    reader = _Reader()
    for word in _TOKEN.findall(prompt.lower()):
        if word in _RELATION:
            reader.close()
            if reader.things:
                reader.open = (len(reader.things) - 1, _RELATION[word])
        elif word in ARTICLES:
            reader.close()
            reader.count, reader.definite = ARTICLES[word], word == "the"
            reader.copula = False
        elif word in NUMBERS or word.isdigit():
            reader.close()
            reader.count = NUMBERS.get(word) or (int(word) if word.isdigit() else None)
        elif word in LINKS or not word[0].isalnum():
            reader.close()
            reader.copula = word in COPULAS
        else:
            reader.run.append(word)
    reader.close()
    return Facts(tuple(reader.things), frozenset(reader.relations))


def loss(original: str, other: str) -> str | None:
    """What ``other`` no longer states of ``original``, or states otherwise; None for nothing."""
    before, after = facts(original), facts(other)
    partners: dict[int, int] = {}
    for index, thing in enumerate(before.things):
        partner = next(
            (
                i
                for i, candidate in enumerate(after.things)
                if i not in partners.values() and _states(candidate, thing)
            ),
            None,
        )
        if partner is None:
            return f"{thing.count or 'several'} {_text(thing.colours | thing.words)}"
        partners[index] = partner
    nouns = {thing.words for thing in before.things}
    for i, thing in enumerate(after.things):
        if i not in partners.values() and thing.words in nouns:
            return f"how many {_text(thing.words)} there are"
    for subject, relation, target in before.relations:
        ends = partners[subject], partners[target]
        if _directed(ends[0], relation, ends[1]) not in after.relations:
            a, b = before.things[subject].words, before.things[target].words
            return f"{_text(a)} {relation} {_text(b)}"
    return None


def _states(candidate: Thing, thing: Thing) -> bool:
    same = candidate.count == thing.count and candidate.colours == thing.colours
    return same and thing.words <= candidate.words


def _text(words: frozenset[str]) -> str:
    return " ".join(sorted(words))


def parts(prompt: str) -> tuple[str, str, tuple[str, ...]]:
    """A prompt as lead ("a photo of "), body, and the additions of ``TAILS`` at its end."""
    lead = next((lead for lead in LEADS if prompt.lower().startswith(lead)), "")
    body = prompt[len(lead) :]
    tails: list[str] = []
    while True:
        tail = next((tail for tail in TAILS if body.endswith(f", {tail}")), None)
        if tail is None:
            return lead, body, tuple(reversed(tails))
        body = body.removesuffix(f", {tail}")
        tails.append(tail)


def whole(lead: str, body: str, tails: tuple[str, ...]) -> str:
    """The inverse of ``parts``."""
    return ", ".join((lead + body, *tails))


def crossed(first: str, second: str, rng: random.Random) -> str:
    """A prompt with lead, body and additions from either of two."""
    (lead, body, tails), (other_lead, other_body, other_tails) = parts(first), parts(second)
    union = tuple(dict.fromkeys((*tails, *other_tails)))
    mixed = tuple(tail for tail in union if rng.random() < 0.5)
    return whole(rng.choice((lead, other_lead)), rng.choice((body, other_body)), mixed)


def edits(prompt: str) -> Iterator[str]:
    """Wordings that differ from ``prompt`` by one edit; some may not state the same."""
    lead, body, tails = parts(prompt)
    for other in LEADS:
        if other != lead:
            yield whole(other, body, tails)
    for text in _body_edits(body):
        yield whole(lead, text, tails)
    for tail in TAILS:
        if tail in tails:
            yield whole(lead, body, tuple(t for t in tails if t != tail))
        elif len(tails) < 2:
            yield whole(lead, body, (*tails, tail))


def _body_edits(body: str) -> Iterator[str]:
    yield from _number_edits(body)
    for name, other in SYNONYMS:
        yield from _replaced(body, name, other)
        yield from _replaced(body, other, name)
    for phrase, relation in _PHRASES:
        before, found, after = body.partition(f" {phrase} ")
        if found:
            for other in RELATIONS[relation]:
                if other != phrase:
                    yield f"{before} {other} {after}"
            if relation in OPPOSITES and not re.search(r"[.,;]| and ", body):
                for other in RELATIONS[OPPOSITES[relation]]:
                    yield f"{after} {other} {before}"
            break
    before, found, after = body.partition(" and ")
    if found and " and " not in after:
        yield from (f"{after} and {before}", f"{before}, {after}", f"{before}. {after}")
        yield f"{before} with {after}"
    for match in re.finditer(r"\b(?:a|an) (\w+) (\w+)", body):
        colour, noun = match[1].lower(), match[2]
        if colour in COLOURS:
            yield body[: match.start()] + f"{article(noun)} that is {colour}" + body[match.end() :]
            if f"the {noun} is" not in body:
                yield f"{body}, the {noun} is {colour}"


def _number_edits(body: str) -> Iterator[str]:
    words = {str(number): word for word, number in NUMBERS.items()}
    for match in re.finditer(r"\w+", body):
        word = match[0].lower()
        other = str(NUMBERS[word]) if word in NUMBERS else words.get(word)
        if other is not None:
            yield body[: match.start()] + other + body[match.end() :]


def _replaced(body: str, name: str, other: str) -> Iterator[str]:
    """``other`` for ``name``, singular or plural, with the article that fits."""
    for ending in ("", "s"):
        match = re.search(rf"\b(an? )?{name}{ending}\b", body)
        if match is not None:
            text = article(other) if match[1] else other + ending
            yield body[: match.start()] + text + body[match.end() :]
