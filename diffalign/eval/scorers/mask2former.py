"""Mask2Former (Cheng et al. 2022, arXiv:2112.01527) as GenEval's detector, with the
post-processing of the official evaluator.

The post-processing of transformers is not used: it reads masks at 384 x 384 whatever the image,
and lets objects cover one another. The weights are Meta's own, not those of the official script:
scores are not interchangeable with published ones to the second digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.core.types import Json, Pipeline
from diffalign.eval.scorers.pretrained import MEAN, STD, facts_of, normalised, pretrained, resized
from diffalign.tasks.geneval.prompts import class_names

if TYPE_CHECKING:
    from torch import Tensor

SHORT, LONG, DIVISOR, MOST = 800, 1333, 32, 100
"""Short and longest side of the network's input, what its sides are multiples of, and the most
objects of an image."""
FLOOR = 0.05
"""Objects below this score are not returned."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One detected object."""

    # index of its class, 0 to 79
    label: int
    score: float
    # (x1, y1, x2, y2) in pixels of the image, x2 and y2 exclusive; zeros for an empty mask
    box: tuple[float, float, float, float]
    # bool [H, W]
    mask: Tensor


def instances(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    inside: tuple[int, int],
    size: tuple[int, int],
) -> list[Instance]:
    """The objects of one image, best first.

    ``classes`` [Q, K + 1] and ``masks`` [Q, h, w]: logits. ``padded``: size of the network's
    input, ``inside``: that of the image in its upper left corner, ``size``: that of the image.
    A query counts once for each class among the hundred best pairs of query and class. The score is
    the class's probability times the mean mask probability inside the mask.
    """
    from torch.nn.functional import interpolate

    probabilities = classes.softmax(-1)[:, :-1]
    count = probabilities.shape[1]
    best = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    results = []
    for p, place in zip(best.values.tolist(), best.indices.tolist()):
        query, label = divmod(place, count)
        if p <= FLOOR:
            continue
        logits = masks[query][None, None]
        logits = interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[..., : inside[0], : inside[1]]
        logits = interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0]
        mask = logits > 0
        score = p * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if score > FLOOR:
            results.append(Instance(label, score, box_of(mask), mask))
    return sorted(results, key=lambda instance: -instance.score)


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask [H, W]; zeros for an empty one."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x1, y1, x2, y2 = (float(value) for value in corners)
    return (x1, y1, x2, y2)


class Mask2Former:
    """A detector of COCO's 80 classes."""

    def __init__(self, name: str, device: str) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.name, self.device = name, device
        self.model: Pipeline = pretrained(Mask2FormerForUniversalSegmentation, name, device)
        labels = self.model.config.id2label
        ends = (str(labels.get(0)), str(labels.get(79)))
        if len(labels) != 80 or ends != ("person", "toothbrush"):
            raise ValueError(
                f"{name!r} has {len(labels)} classes from {ends[0]!r} to {ends[1]!r}; GenEval "
                "needs COCO's 80, person to toothbrush."
            )

    def facts(self) -> Json:
        """Name and hash of the network."""
        return facts_of(self.name, self.model) | {"post_processing": 1}

    def detect(self, image: Tensor) -> list[Instance]:
        """The objects of an image [3, H, W] in [0, 1]; 0.05 is the least score."""
        import torch

        height, width = image.shape[-2:]
        ratio = min(LONG / max(height, width), SHORT / min(height, width))
        inside = (round(height * ratio), round(width * ratio))
        high, wide = (-(-side // DIVISOR) * DIVISOR for side in inside)
        pixels = torch.zeros(1, 3, high, wide, device=self.device)
        small = normalised(resized(image.to(self.device), inside), MEAN, STD)
        pixels[0, :, : inside[0], : inside[1]] = small
        valid = torch.zeros(1, high, wide, dtype=torch.int64, device=self.device)
        valid[:, : inside[0], : inside[1]] = 1
        with torch.no_grad():
            output = self.model(pixel_values=pixels, pixel_mask=valid)
        return instances(
            output.class_queries_logits[0].float().cpu(),
            output.masks_queries_logits[0].float().cpu(),
            (high, wide),
            inside,
            (height, width),
        )


def class_name(label: int) -> str:
    """GenEval's name of a class; by index, because three names differ from COCO's."""
    return class_names()[label]
