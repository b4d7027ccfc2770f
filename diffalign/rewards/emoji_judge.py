"""``emoji-judge`` as a reward: a smooth version of GenEval's verdict (Ghosh, Hajishirzi, Schmidt
2023, arXiv:2310.11513), read from the judge's maps before any threshold. What is optimised with it
must be judged by another model, such as ``emoji-judge-audit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.core.types import Json
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.rewards.base import BaseReward, Facts
from diffalign.tasks.geneval.verdict import parse_prompt

if TYPE_CHECKING:
    from diffalign.embedded.nets.judge import Judge, Maps

SHARP = 10.0
"""Slope of the relation's logistic function per unit of GenEval's normalised offset."""


def peaks(heat: Tensor, count: int, reach: int = 2) -> tuple[Tensor, Tensor]:
    """Rows and columns [count] of the largest values of ``heat`` [H, W], no two closer than
    ``reach`` cells in both axes: take the largest, strike out its neighbourhood, repeat. Needs room
    for ``count``; the judge's 16 x 16 maps always have eleven, one more than GenEval's grammar can
    count.
    """
    rest = heat.detach().clone()
    rows, columns = [], []
    for _ in range(count):
        place = int(rest.argmax())
        y, x = divmod(place, rest.shape[1])
        rest[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = float("-inf")
        rows.append(y)
        columns.append(x)
    return torch.tensor(rows, device=heat.device), torch.tensor(columns, device=heat.device)


def record_of(prompt: str, name: str) -> Json:
    """GenEval's metadata of a prompt; ``name`` is the reward that asks. Raises: ValueError outside
    the grammar."""
    record = parse_prompt(prompt)
    if record is None:
        raise ValueError(
            f"{name}: prompts must be in GenEval's grammar, like 'a photo of two dogs' or 'a photo "
            f"of a red car and a blue cat'; got {prompt!r}. Use the reward 'emoji-clip' for free "
            "text."
        )
    return record


def soft_relation(a: Tensor, b: Tensor, relation: str, threshold: float = 0.1) -> Tensor:
    """Log of a logistic function of how far box ``a`` (cx, cy, w, h) is beyond GenEval's border of
    "a <relation> b"; log .5 on the border.

    As in the rule, the offset of the centres is shrunk by ``threshold`` times the sizes and divided
    by its unshrunk length.
    """
    offset = a[:2] - b[:2]
    shrunk = offset.sign() * F.relu(offset.abs() - threshold * (a[2:] + b[2:]).abs())
    dx, dy = shrunk / offset.norm().clamp(min=1e-6)
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return F.logsigmoid(SHARP * (along - 0.5))


def soft_verdict(maps: Maps, index: int, metadata: Json, position_threshold: float = 0.1) -> Tensor:
    """Log-probability, if all answers of the judge were independent, that the verdict on image
    ``index`` is "correct": a scalar <= 0.

    Each include clause takes the ``count`` best peaks of its class and adds the logs of their
    scores, of their colour among the ten and of their relation to every peak of the target; each
    exclude clause adds the log of one minus the score of its last peak.
    """
    heat, boxes, total = maps.heat[index], [], maps.heat.new_zeros(())
    for clause in metadata["include"]:
        plane = heat[OBJECTS.index(clause["class"])]
        y, x = peaks(plane, clause["count"])
        total = total + F.logsigmoid(plane[y, x]).sum()
        if "color" in clause:
            colours = maps.colour[index, : len(COLOURS), y, x].log_softmax(0)
            total = total + colours[COLOURS.index(clause["color"])].sum()
        side = plane.shape[0]
        centre = torch.stack([x, y]).to(heat.dtype) + 0.5
        box = maps.box[index, :, y, x]
        # Cells and box units are made alike: sizes are in half image sides (32 of 64 pixels), a map
        # has ``side`` cells.
        boxes.append(torch.cat([centre * (2 / side) + box[:2], box[2:]]))
        if "position" in clause:
            relation, target = clause["position"]
            for a in boxes[-1].T:
                for b in boxes[target].T:
                    total = total + soft_relation(a, b, relation, position_threshold)
    for clause in metadata.get("exclude", []):
        plane = heat[OBJECTS.index(clause["class"])]
        y, x = peaks(plane, clause["count"])
        total = total + F.logsigmoid(-plane[y[-1], x[-1]])
    return total


class EmojiJudge(BaseReward):
    """Log-probability of GenEval's verdict "correct", at most 0, for prompts in GenEval's grammar.

    Differentiable. ``judge`` is a loaded ``emoji-judge``, None loads the embedded one. Cost: about
    3 ms an image on one core, three times that with gradient. Raises ValueError for a prompt
    outside the grammar: this reward has no opinion on free text.
    """

    differentiable = True
    name = "emoji-judge"
    facts = Facts("Apache-2.0", "in the package", "1.0 M", "4 MB", "scenes of the embedded world")

    def __init__(self, judge: Judge | None = None) -> None:
        if judge is None:
            from diffalign.embedded.load import load

            judge = load("emoji-judge")
        self.judge = judge

    def unit(self, scores: Tensor) -> Tensor:
        """The probability."""
        return scores.exp()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        records = [record_of(prompt, self.name) for prompt in prompts]
        maps = self.judge.maps(images)
        border = self.judge.thresholds.position_threshold
        return torch.stack(
            [soft_verdict(maps, i, record, border) for i, record in enumerate(records)]
        )
