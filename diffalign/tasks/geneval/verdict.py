"""GenEval's verdict: detections in, verdict and reasons out (Ghosh, Hajishirzi, Schmidt 2023,
arXiv:2310.11513).

The rules are those of the official script of 2025-03-03. Pure functions on plain values: no model,
no image, no tensor library. A detector and a colour classifier fill ``Detection``; the metadata
come from ``prompts()`` or, for free text, ``parse_prompt()``. Verdicts on another detector's
objects are not interchangeable with published ones to the second digit.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from diffalign.tasks.geneval.prompts import (
    COLORS,
    RELATIONS,
    TAGS,
    class_names,
    parse_prompt,
    prompts,
)
from diffalign.tasks.geneval.summary import Summary, TagScore, summary

__all__ = [
    "COLORS",
    "RELATIONS",
    "TAGS",
    "Box",
    "Detection",
    "Summary",
    "TagScore",
    "Thresholds",
    "Verdict",
    "class_names",
    "dense_reward",
    "keep",
    "parse_prompt",
    "prompts",
    "relations",
    "result_line",
    "strict_verdict",
    "summary",
    "verdict",
]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """One detected object, before any threshold.

    Raises: TypeError or ValueError for values of another kind.
    """

    # one of GenEval's class names
    name: str
    # in [0, 1]
    score: float
    # (x1, y1, x2, y2) in pixels, y downwards; it may leave the image
    box: Box
    # the classifier's answer, one of ``COLORS``; None if it was not asked (only colour clauses
    # need it)
    colour: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(
                f"Detection(name=...) must be a class name; got {self.name!r}. Map the classes of "
                "a detector by index, see class_names()."
            )
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(
                f"Detection(score=...) must be in [0, 1]; got {self.score!r} for {self.name!r}. "
                "Pass a probability, not a logit."
            )
        if len(self.box) != 4 or not all(math.isfinite(value) for value in self.box):
            raise ValueError(
                "Detection(box=...) must be four finite pixel values (x1, y1, x2, y2); got "
                f"{self.box!r} for {self.name!r}."
            )
        if self.colour is not None and self.colour not in COLORS:
            raise ValueError(
                f"Detection(colour=...) must be None or one of {', '.join(COLORS)}; got "
                f"{self.colour!r} for {self.name!r}."
            )


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The options of the official evaluator under its own names; the defaults are the official
    values.

    Raises: ValueError for a value out of range.
    """

    # an object is kept if its score is strictly above it
    threshold: float = 0.3
    # the same for the tag ``counting``
    counting_threshold: float = 0.9
    # most objects of a class
    max_objects: int = 16
    # boxes of one class with this intersection over union or more are one object; 1 is off
    max_overlap: float = 1.0
    # share of the two box sizes by which an offset is shrunk before it counts as a relation
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold", "max_overlap"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Thresholds({name}=...) must be in [0, 1]; got {value!r}.")
        if (
            isinstance(self.max_objects, bool)
            or not isinstance(self.max_objects, int)
            or self.max_objects < 1
        ):
            raise ValueError(
                f"Thresholds(max_objects=...) must be an integer >= 1; got {self.max_objects!r}."
            )
        if not 0.0 <= self.position_threshold < math.inf:
            raise ValueError(
                "Thresholds(position_threshold=...) must be finite and >= 0; got "
                f"{self.position_threshold!r}."
            )


OFFICIAL = Thresholds()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What GenEval says of one image."""

    correct: bool
    # one line for each failed clause, empty if correct
    reason: str
    # class -> indices of the detections above the thresholds, best first
    kept: dict[str, list[int]] = field(hash=False)


@dataclass(frozen=True, slots=True)
class _Clause:
    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = -1


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a clause ended."""

    clause: _Clause
    # the objects that it looked at
    objects: list[Detection]
    # "" (passed), "count", "color", "target" or "pair"
    failed: str = ""
    reason: str = ""
    # objects of the colour it asks for
    hits: int = 0


def _clauses(metadata: Mapping[str, object], part: str) -> list[_Clause]:
    allowed = {"class", "count", "color", "position"} if part == "include" else {"class", "count"}
    raw = metadata.get(part, [])
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise TypeError(f"metadata[{part!r}] must be a list of clauses; got {raw!r}.")
    clauses: list[_Clause] = []
    for index, item in enumerate(raw):
        where = f"metadata[{part!r}][{index}]"
        if not isinstance(item, Mapping) or not {"class", "count"} <= set(item) <= allowed:
            raise ValueError(
                f"{where} must be a mapping with class, count and at most {sorted(allowed)}; got "
                f"{item!r}."
            )
        name, count, color = item["class"], item["count"], item.get("color")
        if (
            not isinstance(name, str)
            or isinstance(count, bool)
            or not isinstance(count, int)
            or count < 1
        ):
            raise ValueError(
                f"{where} needs a class name and an integer count >= 1; got {name!r} and {count!r}."
            )
        if color is not None and color not in COLORS:
            raise ValueError(f"{where} needs a color of {', '.join(COLORS)}; got {color!r}.")
        if "position" not in item:
            clauses.append(_Clause(name, count, color))
            continue
        position = item["position"]
        pair = list(position) if isinstance(position, Sequence) else []
        if (
            len(pair) != 2
            or pair[0] not in RELATIONS
            or not isinstance(pair[1], int)
            or not 0 <= pair[1] < index
        ):
            raise ValueError(
                f"{where} needs position = [{' | '.join(RELATIONS)}, index of an earlier clause]; "
                f"got {position!r}."
            )
        clauses.append(_Clause(name, count, color, pair[0], pair[1]))
    return clauses


def _tag(metadata: Mapping[str, object]) -> str:
    tag = metadata.get("tag")
    if not isinstance(tag, str):
        raise TypeError(
            f"metadata['tag'] must be a string (it chooses the threshold); got {tag!r}."
        )
    return tag


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _iou(a: Box, b: Box) -> float:
    """Intersection over union where both end pixels belong to the box (hence the + 1); 0 if the
    union is empty."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return common / union if union else 0.0


def keep(
    detections: Sequence[Detection], tag: str, thresholds: Thresholds = OFFICIAL
) -> dict[str, list[int]]:
    """Class -> indices into ``detections`` that survive the thresholds, most confident first;
    classes with nothing left are absent.

    Scores and limit are compared in float32 as a detector returns them: a score that equals the
    limit is dropped. Only the exact tag ``counting`` has the counting threshold. Equal scores: the
    later detection comes first.
    """
    limit = _float32(thresholds.counting_threshold if tag == "counting" else thresholds.threshold)
    order = sorted(
        range(len(detections)), key=lambda i: (_float32(detections[i].score), i), reverse=True
    )
    above: dict[str, list[int]] = {}
    for index in order:
        if _float32(detections[index].score) > limit:
            above.setdefault(detections[index].name, []).append(index)
    kept: dict[str, list[int]] = {}
    for name, indices in above.items():
        chosen = kept[name] = []
        for index in indices[: thresholds.max_objects]:
            box = detections[index].box
            if thresholds.max_overlap == 1 or all(
                _iou(detections[i].box, box) < thresholds.max_overlap for i in chosen
            ):
                chosen.append(index)
    return kept


def relations(a: Box, b: Box, threshold: float = 0.1) -> tuple[str, ...]:
    """The relations of box ``a`` to box ``b``: none, one or two of ``RELATIONS``, in alphabetical
    order.

    The offset of the centres is shrunk per axis by ``threshold`` times the sum of the two sizes; a
    relation holds where the shrunk offset exceeds half the length of the unshrunk one.
    """
    shrunk, offset = [], []
    for low, high in ((0, 2), (1, 3)):
        o = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        room = threshold * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        offset.append(o)
        shrunk.append(math.copysign(max(abs(o) - room, 0.0), o))
    if all(abs(r) < 1e-3 for r in shrunk):
        return ()
    dx, dy = (r / math.hypot(*offset) for r in shrunk)
    holds = {"above": dy < -0.5, "below": dy > 0.5, "left of": dx < -0.5, "right of": dx > 0.5}
    return tuple(name for name, true in holds.items() if true)


def _judge(
    clause: _Clause,
    pool: list[Detection],
    earlier: list[_Outcome],
    thresholds: Thresholds,
    exact: bool,
) -> _Outcome:
    """One include clause: number, then colour, then position. ``exact``: the number must be met
    exactly and all objects are looked at."""
    objects = pool if exact else pool[: clause.count]
    sign, hits = "==" if exact else ">=", 0
    if len(objects) != clause.count:
        return _Outcome(
            clause,
            objects,
            "count",
            f"expected {clause.name}{sign}{clause.count}, found {len(objects)}",
        )
    if clause.color is not None:
        colours = [object.colour for object in objects]
        if None in colours:
            raise ValueError(
                f"The clause '{clause.color} {clause.name}' needs the colour of every "
                f"{clause.name} it looks at, but a Detection "
                "has colour=None. Run the colour classifier on the kept detections first."
            )
        hits = colours.count(clause.color)
        if hits < clause.count:
            others = ", ".join(f"{colours.count(c)} {c}" for c in COLORS if c in colours)
            reason = (
                f"expected {clause.color} {clause.name}{sign}{clause.count}, found {hits} "
                f"{clause.color}; and {others}"
            )
            return _Outcome(clause, objects, "color", reason, hits)
    if clause.relation is not None:
        target = earlier[clause.target]
        if target.failed:
            return _Outcome(
                clause,
                objects,
                "target",
                f"no target for {clause.name} to be {clause.relation}",
                hits,
            )
        for subject, other in product(objects, target.objects):
            true = relations(subject.box, other.box, thresholds.position_threshold)
            if clause.relation not in true:
                reason = (
                    f"expected {clause.name} {clause.relation} target, found {' and '.join(true)} "
                    "target"
                )
                return _Outcome(clause, objects, "pair", reason, hits)
    return _Outcome(clause, objects, hits=hits)


def _outcomes(
    metadata: Mapping[str, object],
    detections: Sequence[Detection],
    thresholds: Thresholds,
    exact: bool,
) -> tuple[list[_Outcome], dict[str, list[int]]]:
    kept = keep(detections, _tag(metadata), thresholds)
    outcomes: list[_Outcome] = []
    for clause in _clauses(metadata, "include"):
        pool = [detections[i] for i in kept.get(clause.name, [])]
        outcomes.append(_judge(clause, pool, outcomes, thresholds, exact))
    return outcomes, kept


def verdict(
    metadata: Mapping[str, object],
    detections: Sequence[Detection],
    thresholds: Thresholds = OFFICIAL,
) -> Verdict:
    """GenEval's verdict on one image, with the official script's reasons (relations inside a reason
    sorted alphabetically).

    Include clauses look at the ``count`` most confident objects of their class only; extra objects
    matter for exclude clauses alone.

    Raises: ValueError or TypeError for malformed metadata, or if a colour clause meets a detection
    without colour.
    """
    outcomes, kept = _outcomes(metadata, detections, thresholds, exact=False)
    reasons = [outcome.reason for outcome in outcomes if outcome.failed]
    for clause in _clauses(metadata, "exclude"):
        number = len(kept.get(clause.name, []))
        if number >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {number}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def strict_verdict(
    metadata: Mapping[str, object],
    detections: Sequence[Detection],
    thresholds: Thresholds = OFFICIAL,
) -> Verdict:
    """The *strict* reward of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470, its reward server); not
    GenEval.

    Every class must appear exactly ``count`` times among all kept detections, and all of them are
    colour-checked; exclude is ignored.
    """
    outcomes, kept = _outcomes(metadata, detections, thresholds, exact=True)
    reasons = [outcome.reason for outcome in outcomes if outcome.failed]
    return Verdict(not reasons, "\n".join(reasons), kept)


def dense_reward(
    metadata: Mapping[str, object],
    detections: Sequence[Detection],
    thresholds: Thresholds = OFFICIAL,
) -> float:
    """The *dense* reward of the same source as ``strict_verdict``, at most 1 and negative for many
    extra objects; not GenEval.

    Mean of these terms (0.0 without include clauses): per clause 1 - |count - found| / count; after
    a wrong number one 0 if the clause also asks for a colour or a position; else 1 - |count - hits|
    / count for a colour; then, unless the colour failed, for a position 0 if its target failed and
    otherwise always 1, preceded by a 0 if a pair failed (so a wrong relation contributes 0 and 1,
    as published).
    """
    terms: list[float] = []
    for outcome in _outcomes(metadata, detections, thresholds, exact=True)[0]:
        clause = outcome.clause
        terms.append(1 - abs(clause.count - len(outcome.objects)) / clause.count)
        if outcome.failed == "count":
            terms += [0.0] if clause.color or clause.relation else []
            continue
        if clause.color:
            terms.append(1 - abs(clause.count - outcome.hits) / clause.count)
        if clause.relation and outcome.failed != "color":
            terms += {"target": [0.0], "pair": [0.0, 1.0]}.get(outcome.failed, [1.0])
    return sum(terms) / len(terms) if terms else 0.0


def result_line(
    filename: str, metadata: Mapping[str, object], detections: Sequence[Detection], result: Verdict
) -> dict[str, object]:
    """One line of an official results file: filename, tag, prompt, correct, reason, and as JSON
    text metadata and details (class -> rows [x1, y1, x2, y2, score] of the kept detections, best
    first)."""
    details = {
        name: [[*detections[i].box, detections[i].score] for i in indices]
        for name, indices in result.kept.items()
    }
    return {
        "filename": filename,
        "tag": _tag(metadata),
        "prompt": metadata.get("prompt"),
        "correct": result.correct,
        "reason": result.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
