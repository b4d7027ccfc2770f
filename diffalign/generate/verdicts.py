"""GenEval's verdicts on images in [0, 1], given by a judge that finds objects in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from diffalign.core.types import Json
from diffalign.tasks.geneval.verdict import Detection, Thresholds, Verdict, verdict


class Detector(Protocol):
    """A judge: finds objects, and knows the thresholds at which its verdicts are to be read."""

    thresholds: Thresholds

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """The objects of each of ``images`` [B, 3, H, W] in [0, 1], best first."""
        ...


def verdicts(
    judge: Detector, images: Tensor, records: Sequence[Json | None]
) -> list[Verdict | None]:
    """The verdict on each of ``images`` [B, 3, H, W]; None where its prompt has no record.

    ``records``: what GenEval's list, or ``parse_prompt``, says of each image's prompt.
    """
    detections = judge.detect(images)
    return [
        None if record is None else verdict(record, objects, judge.thresholds)
        for record, objects in zip(records, detections, strict=True)
    ]
