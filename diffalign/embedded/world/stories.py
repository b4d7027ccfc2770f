"""What happens in a clip of the embedded world, and the sentences for it.

A story has one or two objects. One may move in a direction, and one may appear while the other is
there, or before the other appears. ``telling`` is the plain grammar, which ``reading`` understands;
``retelling`` words the same facts freely. ``clips`` draws the stories.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from diffalign.embedded.world import captions
from diffalign.embedded.world.captions import PREFIXES, SYNONYMS
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS, article

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
"""Word -> signs of the motion along x and y; y grows downwards."""

EVENTS = ("beside", "before")
"""The first object of the story appears beside the second, which was there from the start; or both
appear, the first before the second."""

KINDS: dict[str, str] = {
    "still": "object",
    "colour": "colour",
    "moving": "motion",
    "moving_coloured": "motion",
    "moving_and": "motion",
    "beside": "order",
    "before": "order",
}
"""Kind of story -> the category that it is scored in."""

MOVES = (" moving {}", " that moves {}", " going {}", " that goes {}")
"""Wordings of a motion; the first is the plain one."""

MEETINGS = (
    "{0} that appears beside {1}",
    "{0} appears next to {1}",
    "{0} appearing near {1}",
)
ORDERS = (
    "{0} that appears before {1}",
    "{1} that appears after {0}",
    "{0} appears and then {1}",
    "first {0} , then {1}",
)


@dataclass(frozen=True)
class Role:
    """One object of a story."""

    # GenEval's
    name: str
    # ``NATIVE``: the caption names no colour
    colour: str = NATIVE
    # a key of ``DIRECTIONS``, or None where the caption says nothing of a motion
    motion: str | None = None


@dataclass(frozen=True)
class Story:
    """The facts that a caption states. With an event there are two roles.

    Raises ValueError for another number of roles, an unknown event, or two roles of one name.
    """

    roles: tuple[Role, ...]
    # one of ``EVENTS``, or None
    event: str | None = None

    def __post_init__(self) -> None:
        names = [role.name for role in self.roles]
        if len(names) not in (1, 2) or len(set(names)) < len(names):
            raise ValueError(f"roles: expected one object or two different ones, got {names}")
        if self.event is not None and (self.event not in EVENTS or len(names) != 2):
            raise ValueError(
                f"event: expected None, or with two roles one of {', '.join(EVENTS)}; got "
                f"{self.event!r} with {len(names)}"
            )


def drawn(rng: random.Random, kind: str) -> Story:
    """A story of this kind, one of ``KINDS``. Two coloured objects never share a colour."""
    second = kind in ("moving_and", "beside", "before")
    share = {"still": 0.0, "moving": 0.0, "colour": 1.0, "moving_coloured": 1.0}.get(kind, 0.25)
    names = rng.sample(OBJECTS, 2 if second else 1)
    colours = rng.sample(COLOURS, len(names))
    roles = []
    for name, colour in zip(names, colours, strict=True):
        while share == 1.0 and name == "person":
            name = rng.choice(OBJECTS)
        tinted = name != "person" and rng.random() < share
        roles.append(Role(name, colour if tinted else NATIVE))
    if kind.startswith("moving"):
        roles[0] = replace(roles[0], motion=rng.choice(list(DIRECTIONS)))
    return Story(tuple(roles), kind if kind in EVENTS else None)


def _noun(role: Role, name: str) -> str:
    return article(name if role.colour == NATIVE else f"{role.colour} {name}")


def telling(story: Story) -> str:
    """The plain sentence: "a photo of a dog moving left and a red apple", "a photo of a cat that
    appears beside a clock"."""
    phrases = [
        _noun(role, role.name) + (f" moving {role.motion}" if role.motion else "")
        for role in story.roles
    ]
    joint = " and " if story.event is None else f" that appears {story.event} "
    return "a photo of " + joint.join(phrases)


def retelling(rng: random.Random, story: Story) -> str:
    """A free wording of the same facts. Draws from ``rng``; at most 20 words."""
    phrases = []
    for role in story.roles:
        name = role.name
        if name in SYNONYMS and rng.random() < 0.4:
            name = rng.choice(SYNONYMS[name])
        motion = rng.choice(MOVES).format(role.motion) if role.motion else ""
        phrases.append(_noun(role, name) + motion)
    prefix = rng.choice(PREFIXES)
    if story.event is not None:
        wordings = MEETINGS if story.event == "beside" else ORDERS
        return prefix + rng.choice(wordings).format(*phrases)
    if len(phrases) > 1 and rng.random() < 0.5:
        phrases = phrases[::-1]
    return prefix + " and ".join(phrases)


_ROLE = (
    rf"an? (?:(?P<colour{{0}}>{'|'.join(COLOURS)}) )??(?P<name{{0}}>{'|'.join(OBJECTS)})"
    rf"(?: moving (?P<motion{{0}}>{'|'.join(DIRECTIONS)}))?"
)
_SENTENCE = re.compile(
    rf"a photo of {_ROLE.format(0)}"
    rf"(?:(?: and | that appears (?P<event>{'|'.join(EVENTS)}) ){_ROLE.format(1)})?"
)


def reading(caption: str) -> Story:
    """The facts of a sentence of the plain grammar, the inverse of ``telling``.

    ValueError for other sentences.
    """
    match = _SENTENCE.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            "prompt: expected a sentence like 'a photo of a dog moving left and a red apple', 'a "
            "photo of a cat that appears beside a clock' or 'a photo of a cat that appears before "
            f"a dog', of the 80 objects and ten colours of the embedded world; got {caption!r}"
        )
    facts = match.groupdict()
    roles = tuple(
        Role(facts[f"name{i}"], facts[f"colour{i}"] or NATIVE, facts[f"motion{i}"])
        for i in (0, 1)
        if facts[f"name{i}"]
    )
    return Story(roles, facts["event"])


def falsified(rng: random.Random, story: Story) -> Story:
    """A story that differs from this one in a single fact: another name, colour or direction, or
    the roles of an event exchanged."""
    changes = ["name"]
    changes += ["colour"] * any(role.colour != NATIVE for role in story.roles)
    changes += ["motion"] * any(role.motion is not None for role in story.roles)
    changes += ["event"] * (story.event is not None)
    change = rng.choice(changes)
    if change == "event":
        return replace(story, roles=story.roles[::-1])
    roles = list(story.roles)
    options = {
        "name": [i for i, role in enumerate(roles) if role.name],
        "colour": [i for i, role in enumerate(roles) if role.colour != NATIVE],
        "motion": [i for i, role in enumerate(roles) if role.motion is not None],
    }
    place = rng.choice(options[change])
    role = roles[place]
    others: dict[str, list[str]] = {
        "name": [name for name in OBJECTS if name not in {other.name for other in roles}],
        "colour": [name for name in COLOURS if name not in {other.colour for other in roles}],
        "motion": [name for name in DIRECTIONS if name != role.motion],
    }
    values = {
        "name": role.name,
        "colour": role.colour,
        "motion": role.motion,
        change: rng.choice(others[change]),
    }
    roles[place] = Role(str(values["name"]), str(values["colour"]), values["motion"])
    return replace(story, roles=tuple(roles))


def story_words() -> list[str]:
    """All words that a sentence about a clip can contain, sorted."""
    phrases = [*OBJECTS, *COLOURS, *DIRECTIONS, *PREFIXES, *MOVES, *MEETINGS, *ORDERS, "a an and"]
    for names in SYNONYMS.values():
        phrases += names
    phrases += ["that appears beside before"]
    return sorted(
        {word for phrase in phrases for word in captions.words(re.sub(r"\{\d?\}", "", phrase))}
    )
