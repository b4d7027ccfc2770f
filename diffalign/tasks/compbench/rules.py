"""The rules of T2I-CompBench++: boxes, labels, depths and probabilities in, scores in [0, 1] out
(Huang et al. 2023, arXiv:2307.06350; 2025, doi 10.1109/TPAMI.2025.3531907).

A rule never sees an image. What the published program does stands as it is, its slips too; mode
``fixed`` of the depth rule repairs one of them. Boxes are pixels of an image that was resized to a
short side of 479 (``FRAME``), because one rule counts pixels. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.tasks.compbench.prompts import PERSONS

FRAME = 479
"""Short side in pixels of the images in which the rules read boxes."""
NEAR = 150.0
"""Pixels within which two objects are next to each other."""
FLOOR = 0.5
"""The least score of a detection that a rule looks at."""
CHUNKS = 8
"""Noun phrases of a prompt that are asked for."""

RELATIONS_2D = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
RELATIONS_3D = ("in front of", "behind", "hidden")
_RENAMED = dict.fromkeys(PERSONS, "person")
_COUNTED = {
    **_RENAMED,
    "ship": "boat",
    "goldfish": "fish",
    "painting": "picture",
    "telivision": "tv",
}

Box = tuple[float, float, float, float]
Mode = Literal["compat", "fixed"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """One detected object."""

    label: str
    # in [0, 1]
    score: float
    # (x1, y1, x2, y2) in pixels of the frame, y downwards
    box: Box


def by_score(detections: Sequence[Labelled]) -> list[Labelled]:
    """Detections that rules look at, best first."""
    order = sorted(detections, key=lambda d: -d.score)
    return [d for d in order if d.score >= FLOOR]


def person(noun: str) -> str:
    """The label that a noun is looked up under."""
    return _RENAMED.get(noun, noun)


def relation_of(prompt: str, relations: Sequence[str] = RELATIONS_2D) -> str | None:
    """The first relation of the list that is a part of the prompt."""
    return next((name for name in relations if name in prompt), None)


def area(box: Box, extra: float = 0.0) -> float:
    """Area of a box; ``extra``: 1 where both end pixels belong to it."""
    return max(box[2] - box[0] + extra, 0.0) * max(box[3] - box[1] + extra, 0.0)


def common(a: Box, b: Box, extra: float = 0.0) -> float:
    """Area of the intersection."""
    corner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return area(corner, extra)


def iou(a: Box, b: Box, extra: float = 0.0) -> float:
    """Intersection over union; 0 for an empty union."""
    shared = common(a, b, extra)
    union = area(a, extra) + area(b, extra) - shared
    return shared / union if union else 0.0


def place_2d(a: Box, b: Box, relation: str | None) -> float:
    """How well "a <relation> b" holds, in [0, 1]."""
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    if relation in ("next to", "near", "on side of"):
        close = abs(dx) < NEAR or abs(dy) < NEAR
        return 1.0 if close else NEAR / max(abs(dx), abs(dy))
    holds = {
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
    }
    if not holds.get(relation or "", False):
        return 0.0
    overlap = iou(a, b)
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def spatial(detections: Sequence[Labelled], objects: Sequence[str], relation: str | None) -> float:
    """The 2D rule: a quarter of each object's score and half of their place, and 0 below one half.

    An object is the most confident detection whose label is exactly the noun. Two objects are
    needed.
    """
    if len(objects) != 2:
        return 0.0
    ordered = by_score(detections)
    pair = [next((d for d in ordered if d.label == person(noun)), None) for noun in objects]
    first, second = pair
    value = sum(0.25 * d.score for d in pair if d is not None)
    if first is not None and second is not None:
        value += 0.5 * place_2d(first.box, second.box, relation)
    return value if value >= 0.5 else 0.0


def _mean_depth(depth: Sequence[Sequence[float]], box: Box, mode: Mode) -> float:
    """Mean of a map [rows][columns] in a box; NaN for none. ``compat`` takes x for rows."""
    x1, y1, x2, y2 = (int(value) for value in box)
    rows, columns = (slice(x1, x2), slice(y1, y2))
    if mode == "fixed":
        rows, columns = columns, rows
    values = [value for line in depth[rows] for value in line[columns]]
    return math.fsum(values) / len(values) if values else math.nan


def place_3d(
    a: Box, b: Box, relation: str | None, depth: Sequence[Sequence[float]], mode: Mode = "compat"
) -> float:
    """How well "a <relation> b" holds in depth, in [0, 1]. ``depth`` [rows][columns]: larger is
    nearer."""
    nearer = _mean_depth(depth, a, mode) - _mean_depth(depth, b, mode)
    holds = {"in front of": nearer > 0, "behind": nearer < 0, "hidden": nearer < 0}
    if not holds.get(relation or "", False):
        return 0.0
    overlap = iou(a, b)
    if overlap > 0.5:
        return 1.0
    return overlap / 0.5 if 0.0 < overlap < 0.5 else 0.0


def spatial_3d(
    detections: Sequence[Labelled],
    objects: Sequence[str],
    relation: str | None,
    depth: Sequence[Sequence[float]],
    mode: Mode = "compat",
) -> float:
    """The 3D rule: a quarter of each object's score and half of their place.

    An object is found where a label contains the noun; detections are looked at by falling score,
    and a later one replaces an earlier one until both nouns are found. ``compat`` reads the depth
    with rows and columns exchanged, as the published program does; ``fixed`` does not.
    """
    ordered, places = by_score(detections), [-1, -1]
    nouns = [person(objects[0]), person(objects[-1])]
    for index, detection in enumerate(ordered):
        for which, noun in enumerate(nouns):
            if noun in detection.label:
                places[which] = index
        if min(places) >= 0:
            break
    pair = [ordered[i] if i >= 0 else None for i in places]
    first, second = pair
    value = sum(0.25 * d.score for d in pair if d is not None)
    if first is not None and second is not None:
        value += 0.5 * place_3d(first.box, second.box, relation, depth, mode)
    return value


def distinct(detections: Sequence[Labelled]) -> list[Labelled]:
    """Detections without duplicates, best first.

    A duplicate has the label of a better one and overlaps it by more than 0.9, by intersection
    over union or over either area, where both end pixels belong to a box.
    """
    singles: list[Labelled] = []
    for d in by_score(detections):
        same = [k for k in singles if k.label == d.label]
        if not any(_covers(k.box, d.box) for k in same):
            singles.append(d)
    return singles


def _covers(a: Box, b: Box) -> bool:
    shared = common(a, b, 1.0)
    smallest = min(area(a, 1.0), area(b, 1.0))
    return iou(a, b, 1.0) > 0.9 or (smallest > 0 and shared / smallest > 0.9)


def numeracy(
    detections: Sequence[Labelled], objects: Sequence[str], counts: Sequence[int]
) -> float:
    """The counting rule: for each object half of its share for being there, and the other half for
    being there as often as asked.

    An object without a label of exactly its name takes over every label that contains the name,
    also for the objects after it.
    """
    labels = [d.label for d in distinct(detections)]
    value = 0.0
    for noun, count in zip(objects, counts, strict=True):
        name = _COUNTED.get(noun, noun)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        number = labels.count(name)
        value += ((number > 0) + (number == count and number > 0)) / (2 * len(objects))
    return value


def attribute(probabilities: Sequence[float]) -> float:
    """The score of an image from the probability of "yes" for each noun phrase of its prompt: the
    product over the first eight, each and the result rounded to four decimals."""
    value = math.prod(round(p, 4) for p in probabilities[:CHUNKS])
    return round(value, 4)


def complex_score(parts: dict[str, float], mixture: Sequence[str]) -> float:
    """The 3-in-1 score: the mean of the named parts."""
    return sum(parts[name] for name in mixture) / len(mixture)
