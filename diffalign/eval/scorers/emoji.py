"""The embedded detectors as scorers: GenEval's verdicts, and the rules of T2I-CompBench++ for the
prompts whose nouns the embedded world knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from diffalign.core.identity import model_hash
from diffalign.core.types import Json
from diffalign.embedded.load import load
from diffalign.embedded.world.editions import FIRST, SECOND, Edition
from diffalign.embedded.world.scenes import HELD_OUT, World
from diffalign.eval.benchmarks import Item
from diffalign.eval.scorers.base import Outcome
from diffalign.eval.scorers.world import knows, phrases_of
from diffalign.generate.verdicts import Detector
from diffalign.tasks.compbench import rules
from diffalign.tasks.geneval.verdict import Detection, keep, verdict

if TYPE_CHECKING:
    from torch import Tensor

CANARIES = 12
"""Scenes that are scored with their own facts and with wrong ones, before any image."""


class EmojiScorer:
    """A detector of the embedded world, in the edition that it was trained on."""

    def __init__(self, name: str, judge: Detector, edition: Edition = FIRST) -> None:
        self.name, self.judge, self.edition = name, judge, edition

    def facts(self) -> Json:
        """Name and hash of the network, and the thresholds."""
        net = getattr(self.judge, "net", None)
        revision = type(self.judge).__name__ if net is None else model_hash(net)
        thresholds = asdict(self.judge.thresholds)
        return {"name": self.name, "revision": revision, "thresholds": thresholds, "rules": 1}

    def knows(self, item: Item) -> bool:
        """Whether all nouns of the prompt are of the embedded world."""
        return knows(item)

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """Verdicts, or scores by the rules, of one prompt's images."""
        import torch

        outcomes = []
        for image, objects in zip(
            images, self.judge.detect(torch.stack(list(images))), strict=True
        ):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            measured: Json = {"size": list(size), "detections": [_row(d) for d in objects]}
            if "include" in item.facts:
                result = verdict(item.facts, objects, self.judge.thresholds)
                outcomes.append(Outcome(float(result.correct), result.reason, measured))
            else:
                outcomes.append(Outcome(*self._by_rule(item, objects, size), measured))
        return outcomes

    def _by_rule(
        self, item: Item, objects: Sequence[Detection], size: tuple[int, int]
    ) -> tuple[float, str]:
        """Score and reason of an image of a prompt of T2I-CompBench++."""
        if item.tag == "color":
            return self._by_colour(item, objects)
        scale = rules.FRAME / min(size)
        boxes = [
            rules.Labelled(d.name, d.score, _scaled(d.box, scale))
            for indices in keep(objects, "", self.judge.thresholds).values()
            for d in (objects[i] for i in indices)
        ]
        shown = ", ".join(f"{d.label} {d.score:.2f}" for d in rules.by_score(boxes)) or "nothing"
        if item.tag == "numeracy":
            value = rules.numeracy(boxes, item.facts["objects"], item.facts["counts"])
        else:
            nouns = [item.facts["nouns"][i] for i in (0, -1)]
            value = rules.spatial(boxes, nouns, rules.relation_of(item.prompt))
        return value, "" if value > 0.99 else f"saw {shown}"

    def _by_colour(self, item: Item, objects: Sequence[Detection]) -> tuple[float, str]:
        """The product over the noun phrases of the best score of such an object; 0 for none."""
        parts = []
        for colour, noun in phrases_of(item):
            scores = [d.score for d in objects if (d.name, d.colour) == (noun, colour)]
            parts.append((max(scores, default=0.0), f"{colour} {noun}"))
        missing = [name for score, name in parts if score < self.judge.thresholds.threshold]
        reason = f"no {' and no '.join(missing)}" if missing else ""
        return math.prod(score for score, _ in parts), reason

    def canary(self) -> str | None:
        """Rendered scenes with their own facts, and with facts that differ in one place."""
        import torch

        seed, right, wrong = HELD_OUT.start, 0, 0
        pairs = list(World(edition=self.edition).wrong(seed, CANARIES))
        pixels = torch.stack([torch.from_numpy(scene.image.copy()) for scene, _ in pairs])
        images = pixels.permute(0, 3, 1, 2).float() / 255
        for (scene, false), objects in zip(pairs, self.judge.detect(images), strict=True):
            right += verdict(scene.metadata(), objects, self.judge.thresholds).correct
            wrong += verdict(false, objects, self.judge.thresholds).correct
        if right < 0.8 * len(pairs) or wrong > 0.2 * len(pairs):
            return (
                f"of {len(pairs)} rendered scenes it calls {right} right with their own prompts "
                f"and {wrong} with wrong ones"
            )
        return None


def _scaled(box: rules.Box, scale: float) -> rules.Box:
    x1, y1, x2, y2 = (value * scale for value in box)
    return (x1, y1, x2, y2)


def _row(detection: Detection) -> list[object]:
    """A detection as JSON data; six digits are more than a detector knows."""
    numbers = [round(value, 3) for value in detection.box]
    return [detection.name, round(detection.score, 6), *numbers, detection.colour]


def emoji_judge(device: str) -> EmojiScorer:
    """The detector that ships, on the CPU whatever the device: it takes a millisecond an image."""
    return EmojiScorer("emoji-judge", load("emoji-judge"))


def emoji_judge_audit(device: str) -> EmojiScorer:
    """The second detector, of another architecture."""
    return EmojiScorer("emoji-judge-audit", load("emoji-judge-audit"))


def emoji_judge_2(device: str) -> EmojiScorer:
    """The detector of the second edition, whose pictures ``emoji-dit`` makes."""
    return EmojiScorer("emoji-judge-2", load("emoji-judge-2"), SECOND)


def emoji_judge_audit_2(device: str) -> EmojiScorer:
    """The second detector of the second edition."""
    return EmojiScorer("emoji-judge-audit-2", load("emoji-judge-audit-2"), SECOND)
