"""GenEval with models of the hub: Mask2Former finds objects, CLIP names their colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from diffalign.core.types import Json
from diffalign.eval.benchmarks import Item
from diffalign.eval.scorers import canary
from diffalign.eval.scorers.base import Outcome
from diffalign.eval.scorers.colours import Colours
from diffalign.eval.scorers.mask2former import Mask2Former, class_name
from diffalign.tasks.geneval.prompts import class_names
from diffalign.tasks.geneval.verdict import OFFICIAL, Detection, verdict

if TYPE_CHECKING:
    from torch import Tensor


class GenEvalScorer:
    """The official verdicts on what a detector and a colour classifier see."""

    def __init__(self, name: str, detector: Mask2Former, colours: Colours) -> None:
        self.name, self.detector, self.colours = name, detector, colours

    def facts(self) -> Json:
        """Networks and thresholds."""
        return {
            "name": self.name,
            "detector": self.detector.facts(),
            "colours": self.colours.facts(),
            "thresholds": asdict(OFFICIAL),
        }

    def knows(self, item: Item) -> bool:
        """Prompts with clauses of COCO's classes."""
        clauses = item.facts.get("include", []) + item.facts.get("exclude", [])
        return "include" in item.facts and all(c["class"] in class_names() for c in clauses)

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """Verdicts on one prompt's images; colours are asked for where the prompt names one."""
        coloured = {c["class"] for c in item.facts["include"] if "color" in c}
        outcomes = []
        for image in images:
            objects = []
            for instance in self.detector.detect(image):
                name, colour = class_name(instance.label), None
                if name in coloured:
                    colour = self.colours.of(image, instance.box, instance.mask, name)
                objects.append(Detection(name, min(instance.score, 1.0), instance.box, colour))
            result = verdict(item.facts, objects)
            rows = [[d.name, round(d.score, 6), *d.box, d.colour] for d in objects]
            measured: Json = {"size": list(image.shape[-2:]), "detections": rows}
            outcomes.append(Outcome(float(result.correct), result.reason, measured))
        return outcomes

    def canary(self) -> str | None:
        """A photograph of a cat must show a cat and no bicycle, grey nothing, and the colour
        classifier must know plain colours."""
        limit = OFFICIAL.counting_threshold
        for instance in self.detector.detect(canary.plain((0.5, 0.5, 0.5))):
            if instance.score > limit:
                name = class_name(instance.label)
                return f"it sees {name} with {instance.score:.2f} in a grey picture"
        for colour, rgb in canary.PLAIN.items():
            image = canary.plain(rgb, 224)
            answer = self.colours.of(image, (0.0, 0.0, 224.0, 224.0), None, "car")
            if answer != colour:
                return f"the colour classifier calls a plain {colour} picture {answer}"
        return canary.verdicts(self.score)


def mask2former(device: str) -> GenEvalScorer:
    """The small detector, Swin-S, of the size of the official one."""
    detector = Mask2Former("facebook/mask2former-swin-small-coco-instance", device)
    return GenEvalScorer("mask2former", detector, Colours.official(device))


def mask2former_large(device: str) -> GenEvalScorer:
    """The large detector, Swin-L."""
    detector = Mask2Former("facebook/mask2former-swin-large-coco-instance", device)
    return GenEvalScorer("mask2former-large", detector, Colours.official(device))
