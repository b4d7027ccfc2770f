"""The embedded world: seeded scenes of GenEval's objects with captions and exact truth.

Definition of the first edition, 64 x 64. An object is a 32 x 32 cell whose picture fills 30 x 30
pixels; cells lie on a grid of 8 pixels and never overlap; one to four objects; the background is
one mid-tone of low saturation with a slight vertical gradient. A caption names every object and
every colour that is not the picture's own. ``editions`` has the second edition, 128 x 128, in which
all of this but the captions is freer. Cost: about 0.1 ms a scene on one core after 0.3 s of set-up.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from diffalign.core.types import Json
from diffalign.embedded.world.captions import Group, geneval, paraphrase
from diffalign.embedded.world.editions import FIRST, Edition, Layout, Place
from diffalign.embedded.world.glyphs import sprite
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS, OPPOSITE, RELATIONS

SIZE, CELL, GRID = FIRST.side, FIRST.cells[1][0], FIRST.grid
"""Side of an image, side of an object's cell and step of the layout, in pixels, in the first
edition."""

KINDS: dict[str, str | None] = {
    "single": "single_object",
    "colour": "colors",
    "two": "two_object",
    "count": "counting",
    "position": "position",
    "two_coloured": "color_attr",
    "count_coloured": None,
    "position_coloured": None,
    "numbers": None,
    "three": None,
}
"""Kind of scene -> the GenEval category whose prompts it illustrates, or None."""

DEFAULT_MIX: dict[str, float] = {
    "single": 0.12, "colour": 0.16, "two": 0.18, "count": 0.16, "position": 0.15,
    "two_coloured": 0.14, "count_coloured": 0.02, "position_coloured": 0.02, "numbers": 0.03,
    "three": 0.02,
}  # fmt: skip
"""The shipped mixture of kinds; weights need not add up to one."""

HELD_OUT = range(1_000_000, 1_001_000)
"""Seeds that no training script uses; every published figure on rendered scenes comes from them."""


@dataclass(frozen=True)
class Object:
    """One object of a scene."""

    # GenEval's
    name: str
    # (x1, y1, x2, y2) of the visible pixels, x2 and y2 exclusive
    box: tuple[int, int, int, int]
    # one of ten, or "native"
    colour: str


@dataclass(frozen=True)
class Scene:
    """A picture with its caption and truth."""

    # uint8 [side, side, 3]
    image: npt.NDArray[np.uint8]
    caption: str
    objects: tuple[Object, ...]
    # one of ``KINDS``
    kind: str
    # the facts that the caption states
    groups: tuple[Group, ...]
    relation: str | None
    # the cells of the objects
    layout: Layout = ()
    # mean colour of the background in squares of 8 x 8 pixels, float32 [side / 8, side / 8, 3]
    tones: npt.NDArray[np.float32] | None = None

    @property
    def tag(self) -> str | None:
        """GenEval's category of this kind of scene, or None."""
        return KINDS[self.kind]

    def metadata(self) -> Json:
        """The GenEval metadata record of these facts; its prompt is in GenEval's grammar even where
        the caption is a paraphrase.

        Raises ValueError for kinds outside GenEval's six categories (``tag`` is None).
        """
        if self.tag is None:
            raise ValueError(
                f"A scene of kind {self.kind!r} has no GenEval category; test scene.tag before "
                "metadata."
            )
        return _metadata(self.tag, self.groups, self.relation)


def _metadata(tag: str, groups: tuple[Group, ...], relation: str | None) -> Json:
    clauses: list[Json] = []
    for group in groups:
        clause: Json = {"class": group.name, "count": group.count}
        if group.colour != NATIVE:
            clause["color"] = group.colour
        clauses.append(clause)
    record: Json = {"tag": tag, "include": clauses}
    if tag == "counting":
        record["exclude"] = [{"class": groups[0].name, "count": groups[0].count + 1}]
    if relation is not None:
        subject, target = clauses
        record["include"] = [target, {**subject, "position": [relation, 0]}]
    return record | {"prompt": geneval(groups, relation)}


@dataclass(frozen=True)
class Stamp:
    """The picture of an object at one size, ready to be laid over a background."""

    # int16 [side, side, 3]
    colour: npt.NDArray[np.int16]
    # share of the background that shows through, float32 [side, side, 1]
    clear: npt.NDArray[np.float32]
    # (x1, y1, x2, y2) of the visible pixels; the same in every colour
    box: tuple[int, int, int, int]


@functools.cache
def stamp(name: str, colour: str, side: int) -> Stamp:
    """The picture of ``name`` in ``colour`` (or native) in a cell of ``side`` pixels, one of which
    stays free on every side."""
    pixels = np.pad(sprite(name, colour, side - 2), ((1, 1), (1, 1), (0, 0)))
    visible = pixels[..., 3] > 24
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return Stamp(
        pixels[..., :3].astype(np.int16),
        ((255 - pixels[..., 3:]) / np.float32(255)).astype(np.float32),
        (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
    )


def paste(canvas: npt.NDArray[np.float32], group: Group, place: Place) -> Object:
    """Draw one object of ``group`` on ``canvas``, float32 [side, side, 3], in place; returns its
    truth."""
    x, y, side = place
    picture = stamp(group.name, group.colour, side)
    cell = canvas[y : y + side, x : x + side]
    cell *= picture.clear
    cell += picture.colour
    x1, y1, x2, y2 = picture.box
    return Object(group.name, (x + x1, y + y1, x + x2, y + y2), group.colour)


def rounded(canvas: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The finished picture, uint8."""
    return (canvas + np.float32(0.5)).astype(np.uint8)


@dataclass(frozen=True)
class World:
    """A stream of scenes.

    Raises: ValueError for unknown kinds, negative weights or a mixture without weight.
    """

    # kind of scene -> weight
    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    # share of captions in GenEval's exact grammar; the others are paraphrases
    plain: float = 0.6
    edition: Edition = FIRST

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.mix) - set(KINDS)):
            raise ValueError(
                f"World(mix=...) must hold kinds among {', '.join(KINDS)}; got "
                f"{', '.join(unknown)}."
            )
        if min(self.mix.values(), default=0.0) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(
                f"World(mix=...) must have weights >= 0 with a positive sum; got {self.mix}."
            )
        if not 0 <= self.plain <= 1:
            raise ValueError(f"World(plain=...) must be a share in [0, 1]; got {self.plain}.")

    def scenes(self, seed: int, count: int) -> Iterator[Scene]:
        """``count`` scenes; scene i depends on ``seed`` and i's predecessors only, so a longer
        stream begins like a shorter one."""
        rng = random.Random(seed)
        kinds, weights = list(self.mix), list(self.mix.values())
        for _ in range(count):
            yield self._scene(rng, rng.choices(kinds, weights)[0])

    def arrays(
        self, seed: int, count: int
    ) -> tuple[npt.NDArray[np.uint8], list[str], npt.NDArray[np.int64]]:
        """The same scenes in one piece: images uint8 [count, side, side, 3], captions, and truth
        int64 [count, most, 6].

        A truth row is (class, colour, x1, y1, x2, y2) with class -1 where a scene has fewer than
        the ``most`` objects of its edition; colour 10 is native.
        """
        side, most = self.edition.side, self.edition.most
        images = np.empty((count, side, side, 3), dtype=np.uint8)
        truth = np.full((count, most, 6), -1, dtype=np.int64)
        captions = []
        colours = {name: index for index, name in enumerate((*COLOURS, NATIVE))}
        for i, scene in enumerate(self.scenes(seed, count)):
            images[i] = scene.image
            captions.append(scene.caption)
            for j, thing in enumerate(scene.objects):
                truth[i, j] = (OBJECTS.index(thing.name), colours[thing.colour], *thing.box)
        return images, captions, truth

    def wrong(self, seed: int, count: int) -> Iterator[tuple[Scene, Json]]:
        """Scenes with the GenEval metadata of a neighbouring prompt that is **false** for them, one
        changed fact each.

        Changes: another class, another number, another colour, the opposite relation, exchanged
        colours. Scenes of kinds without GenEval category are skipped, so the stream still has
        ``count`` pairs. ValueError if the mixture has no GenEval kind.
        """
        if not any(weight > 0 and KINDS[kind] for kind, weight in self.mix.items()):
            raise ValueError(
                f"World(mix=...) must hold a kind with a GenEval category; got {self.mix}."
            )
        mix = {kind: weight for kind, weight in self.mix.items() if KINDS[kind]}
        world = replace(self, mix=mix)
        rng = random.Random(seed + 7_919)
        for scene in world.scenes(seed, count):
            yield scene, _falsified(rng, scene)

    def _scene(self, rng: random.Random, kind: str) -> Scene:
        groups, relation = facts(rng, kind, self.edition)
        total = sum(group.count for group in groups)
        layout = self.edition.layout(rng, total, relation)
        caption = (
            geneval(groups, relation)
            if rng.random() < self.plain
            else paraphrase(rng, groups, relation)
        )
        return drawn(kind, caption, groups, relation, layout, self.edition.background(rng))


def drawn(
    kind: str,
    caption: str,
    groups: tuple[Group, ...],
    relation: str | None,
    layout: Layout,
    background: npt.NDArray[np.float32],
) -> Scene:
    """The scene of these facts at these places over ``background``, which stays as it is."""
    canvas, side = background.copy(), len(background) // 8
    members = [group for group in groups for _ in range(group.count)]
    objects = tuple(
        paste(canvas, group, place) for place, group in zip(layout, members, strict=True)
    )
    tones = background.reshape(side, 8, side, 8, 3).mean((1, 3))
    return Scene(rounded(canvas), caption, objects, kind, groups, relation, layout, tones)


def facts(
    rng: random.Random, kind: str, edition: Edition = FIRST
) -> tuple[tuple[Group, ...], str | None]:
    """Draw the groups of a scene of this kind and, for position scenes, the relation of the first
    to the second."""
    if kind in ("single", "colour", "count", "count_coloured"):
        number = rng.choice((2, 3, 4)) if kind.startswith("count") else 1
        coloured = kind in ("colour", "count_coloured")
        return (
            Group(_name(rng, coloured), number, rng.choice(COLOURS) if coloured else NATIVE),
        ), None
    coloured = kind.endswith("coloured")
    if kind == "three":
        coloured = rng.random() < 0.5
    names: list[str] = []
    while len(names) < (3 if kind == "three" else 2):
        name = _name(rng, coloured)
        if name not in names:
            names.append(name)
    counts = rng.choice(edition.numbers) if kind == "numbers" else (1,) * len(names)
    colours = rng.sample(COLOURS, len(names)) if coloured else [NATIVE] * len(names)
    relation = rng.choice(RELATIONS) if kind.startswith("position") else None
    return tuple(Group(*fact) for fact in zip(names, counts, colours, strict=True)), relation


def _name(rng: random.Random, coloured: bool) -> str:
    """An object name; as in GenEval a person has no colour."""
    return rng.choice(OBJECTS[1:] if coloured else OBJECTS)


def _falsified(rng: random.Random, scene: Scene) -> Json:
    """The metadata of a prompt that differs from the scene's facts in one place."""
    groups, relation = list(scene.groups), scene.relation
    tag = KINDS[scene.kind]
    assert tag is not None
    changes = ["class"]
    if tag == "counting":
        changes.append("number")
    if tag in ("colors", "color_attr"):
        changes.append("colour")
    if tag == "color_attr":
        changes.append("exchange")
    if tag == "position":
        changes.append("relation")
    change = rng.choice(changes)
    place = rng.randrange(len(groups))
    old = groups[place]
    if change == "class":
        present = {group.name for group in groups}
        name = rng.choice([name for name in OBJECTS[1:] if name not in present])
        groups[place] = Group(name, old.count, old.colour)
    elif change == "number":
        groups[place] = Group(
            old.name, rng.choice([n for n in (2, 3, 4) if n != old.count]), old.colour
        )
    elif change == "colour":
        groups[place] = Group(
            old.name,
            old.count,
            rng.choice([c for c in COLOURS if c not in {group.colour for group in groups}]),
        )
    elif change == "exchange":
        groups = [
            Group(groups[0].name, 1, groups[1].colour),
            Group(groups[1].name, 1, groups[0].colour),
        ]
    else:
        assert relation is not None
        relation = OPPOSITE[relation]
    return _metadata(tag, tuple(groups), relation)
