"""``emoji-judge-audit``: a second detector, of another architecture, head and seed, that only
checks whether the first one is fooled.

A small transformer over an 8 x 8 grid that classifies every cell and regresses box edges from it,
without anchors or heat-map peaks (in the manner of Tian et al., "FCOS: Fully Convolutional
One-Stage Object Detection", 2019, arXiv:1904.01355); overlapping answers are merged by suppression.
It shares no layer type above the stem, no target and no loss with ``emoji-judge``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Json
from diffalign.embedded.nets.judge import SIDE, SPAN, checked
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.tasks.geneval.verdict import Detection, Thresholds

STEP = 8
"""Pixels of a cell."""
NEAR = 10.0
"""A cell answers for an object if its centre lies within this many pixels of the object's, per
axis."""


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(
            -1
        )  # 64 tokens: the plain form is the fastest on a CPU
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norms[1](x))
        return result


class AuditNet(nn.Module):
    """Images [B, 3, side, side] in [0, 1] to [B, 81 + 4 + 11, side / 8, side / 8]: class logits
    with "nothing" last, the distances of the box's left, top, right and bottom edge from the cell's
    centre in units of 32 pixels, colour logits."""

    def __init__(
        self,
        width: int = 160,
        layers: int = 4,
        heads: int = 4,
        seed: int = 0,
        side: int = SIDE,
    ) -> None:
        super().__init__()
        self.side = side
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(
                nn.Conv2d(3, 64, 4, 4), nn.GELU(), nn.Conv2d(64, width, 4, 2, 1), nn.GELU()
            )
            self.place = nn.Parameter(0.02 * torch.randn(1, (side // STEP) ** 2, width))
            self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(layers)))
            self.head = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, len(OBJECTS) + 1 + 4 + len(COLOURS) + 1)
            )

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images * 4 - 2).flatten(2).transpose(1, 2)
        output: Tensor = self.head(self.layers(tokens + self.place)).float()
        return output.transpose(1, 2).reshape(len(images), -1, self.side // STEP, self.side // STEP)


def _centres(side: int) -> Tensor:
    """Centres (x, y) of the cells in pixels: float [side, side, 2]."""
    ticks = (torch.arange(side) + 0.5) * STEP
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)


def cell_targets(truth: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Truth float [B, 4, 6] to the class of each cell, int64 [B, side, side] with 80 for nothing,
    and the row it answers for (0 to 3)."""
    middle = (truth[..., 2:4] + truth[..., 4:6]) / 2
    far = (
        (_centres(side)[None, :, :, None] - middle[:, None, None]).abs().amax(-1)
    )  # [B, side, side, 4]
    far = far.masked_fill((truth[..., 0] < 0)[:, None, None], float("inf"))
    distance, row = far.min(-1)
    kind = truth[..., 0].long().gather(1, row.flatten(1)).view(row.shape)
    return torch.where(distance < NEAR, kind, len(OBJECTS)), row


def audit_loss(output: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the class of all cells; smooth L1 of the edges and cross-entropy of the
    colour of the cells that have an object."""
    kinds, edges, colours = torch.split(output, [len(OBJECTS) + 1, 4, len(COLOURS) + 1], dim=1)
    side = output.shape[-1]
    kind, row = cell_targets(truth, side)
    image, y, x = (kind < len(OBJECTS)).nonzero(as_tuple=True)
    thing = truth[image, row[image, y, x]]
    centre = _centres(side)[y, x]
    want = torch.cat([centre - thing[:, 2:4], thing[:, 4:6] - centre], dim=1) / SPAN
    total = max(1, len(thing))
    box = F.smooth_l1_loss(edges[image, :, y, x], want, beta=0.1, reduction="sum") / total
    colour = F.cross_entropy(colours[image, :, y, x], thing[:, 1].long(), reduction="sum") / total
    return {"class": 4 * F.cross_entropy(kinds, kind), "box": 2 * box, "colour": 0.5 * colour}


class AuditJudge:
    """Detections of a trained network, for comparison only; ``thresholds`` belong to
    ``geneval.verdict``.

    Cells answer for one object if they name one class and their boxes overlap by more than
    ``overlap`` (intersection over union). ``mean``: its box is then the mean of theirs by score,
    instead of that of the best cell; where sizes differ, one cell's box is not exact.
    """

    def __init__(
        self,
        net: AuditNet,
        thresholds: Thresholds,
        floor: float = 0.05,
        overlap: float = 0.4,
        mean: bool = False,
    ) -> None:
        self.net, self.thresholds = net.eval().requires_grad_(False), thresholds
        self.floor, self.overlap, self.mean = floor, overlap, mean

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Detection]]:
        """As ``Judge.detect``. Score: probability of the class in the best cell."""
        output = self.net(checked(images, "emoji-judge-audit", self.net.side))
        kinds, edges, colours = torch.split(output, [len(OBJECTS) + 1, 4, len(COLOURS) + 1], dim=1)
        chance = kinds.softmax(1)[:, : len(OBJECTS)]
        scale = torch.tensor([images.shape[i] / self.net.side for i in (3, 2)] * 2)
        centres = _centres(output.shape[-1])
        answers = []
        for b in range(len(images)):
            k, y, x = (chance[b] > self.floor).nonzero(as_tuple=True)
            score, reach = chance[b, k, y, x], edges[b, :, y, x].T * SPAN
            boxes = torch.cat([centres[y, x] - reach[:, :2], centres[y, x] + reach[:, 2:]], dim=1)
            colour = colours[b, : len(COLOURS), y, x].argmax(0)
            found = []
            for best, *others in self._groups(k, score, boxes):
                members = [best, *others] if self.mean else [best]
                weight = score[members] / score[members].sum()
                x1, y1, x2, y2 = ((weight @ boxes[members]) * scale).tolist()
                tone = COLOURS[int(colour[best])]
                found.append(
                    Detection(OBJECTS[int(k[best])], float(score[best]), (x1, y1, x2, y2), tone)
                )
            answers.append(found)
        return answers

    def _groups(self, kind: Tensor, score: Tensor, boxes: Tensor) -> list[list[int]]:
        """The cells that answer for each object, best first."""
        groups: list[list[int]] = []
        for i in score.argsort(descending=True).tolist():
            for group in groups:
                first = group[0]
                if kind[first] == kind[i] and _overlap(boxes[first], boxes[i]) > self.overlap:
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups


def _overlap(a: Tensor, b: Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    common = (high - low).clamp(min=0).prod()
    return float(
        common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common).clamp(min=1e-6)
    )


def load_audit(folder: Path) -> AuditJudge:
    """The second judge saved in ``folder`` in fp32 on the CPU."""
    config: Json = json.loads((folder / "config.json").read_text())
    net = AuditNet(**config["net"])
    net.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
    return AuditJudge(net, Thresholds(**config["thresholds"]), **config.get("answers", {}))
