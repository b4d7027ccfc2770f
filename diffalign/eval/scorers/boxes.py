"""D-FINE (Peng et al. 2024, arXiv:2410.13842) with the 365 classes of Objects365, in the place of
the UniDet of T2I-CompBench: other labels and other scores, so the metric carries its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.core.types import Json, Pipeline
from diffalign.eval.scorers.pretrained import facts_of, pretrained, resized
from diffalign.tasks.compbench.rules import FRAME, Labelled

if TYPE_CHECKING:
    from torch import Tensor

NAME = "ustc-community/dfine-xlarge-obj365"
SIDE, MOST = 640, 300
SYNONYMS = {
    "cell phone": "phone",
    "dining table": "table",
    "handbag": "bag",
    "monitor": "computer",
    "picture": "painting",
    "tv": "television",
}
"""Label of the detector -> further noun under which it is looked up."""


def detections(
    logits: Tensor, boxes: Tensor, size: tuple[int, int]
) -> list[tuple[int, float, tuple[float, float, float, float]]]:
    """Class, score and box in pixels of ``size`` (height, width), best first.

    ``logits`` [Q, K]; ``boxes`` [Q, 4]: centre and size in [0, 1]. The 300 best pairs of query and
    class count.
    """
    scores = logits.sigmoid()
    best = scores.flatten().topk(min(MOST, scores.numel()))
    height, width = size
    results = []
    for score, place in zip(best.values.tolist(), best.indices.tolist()):
        query, label = divmod(place, scores.shape[1])
        x, y, w, h = boxes[query].tolist()
        box = ((x - w / 2) * width, (y - h / 2) * height)
        results.append((label, score, (*box, (x + w / 2) * width, (y + h / 2) * height)))
    return results


def renamed(detection: Labelled, nouns: Sequence[str]) -> Labelled:
    """A detection under the noun that names it: one part of a label like "cabinet/shelf", or a
    synonym."""
    names = {*detection.label.split("/"), SYNONYMS.get(detection.label, detection.label)}
    match = next((noun for noun in nouns if noun in names), None)
    return detection if match is None else Labelled(match, detection.score, detection.box)


class Boxes:
    """A detector of everyday things."""

    def __init__(self, name: str = NAME, device: str = "cpu") -> None:
        from transformers import DFineForObjectDetection

        self.name, self.device = name, device
        self.model: Pipeline = pretrained(DFineForObjectDetection, name, device)

    def facts(self) -> Json:
        """Name and hash of the network, and its synonyms."""
        return facts_of(self.name, self.model) | {"synonyms": SYNONYMS}

    def detect(self, image: Tensor) -> list[Labelled]:
        """Objects of an image [3, H, W] in [0, 1], best first, in the frame of the rules."""
        import torch

        pixels = resized(image.to(self.device), (SIDE, SIDE))
        with torch.no_grad():
            output = self.model(pixel_values=pixels[None])
        height, width = image.shape[-2:]
        scale = FRAME / min(height, width)
        names = self.model.config.id2label
        return [
            Labelled(str(names[label]).lower(), score, box)
            for label, score, box in detections(
                output.logits[0].float().cpu(),
                output.pred_boxes[0].float().cpu(),
                (round(height * scale), round(width * scale)),
            )
        ]
