"""Which prompts the embedded world can show, without loading a model."""

from __future__ import annotations

from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.eval.benchmarks import Item
from diffalign.tasks.compbench import rules


def knows(item: Item) -> bool:
    """GenEval's clauses, and prompts of color, spatial and numeracy, with nouns of the world."""
    if "include" in item.facts:
        clauses = item.facts["include"] + item.facts.get("exclude", [])
        return all(clause["class"] in OBJECTS for clause in clauses)
    if not item.place.startswith("compbench/"):
        return False
    nouns = nouns_of(item)
    return bool(nouns) and all(noun in OBJECTS for noun in nouns)


def nouns_of(item: Item) -> list[str]:
    """The objects that a rule looks for in the images of a prompt; none where no rule can."""
    if item.tag == "color":
        return [noun for _, noun in phrases_of(item)]
    if item.tag == "numeracy":
        return [rules.person(noun) for noun in item.facts["objects"]]
    if item.tag == "spatial":
        return [rules.person(item.facts["nouns"][i]) for i in (0, -1)]
    return []


def phrases_of(item: Item) -> list[tuple[str, str]]:
    """Colour and noun of each noun phrase; nothing where a phrase is not "a colour noun"."""
    pairs = []
    for phrase in item.facts["noun_phrases"]:
        article, _, rest = str(phrase).lower().partition(" ")
        colour, _, noun = rest.partition(" ")
        if article not in ("a", "an", "the") or colour not in COLOURS or not noun:
            return []
        pairs.append((colour, noun))
    return pairs
