"""``emoji-judge``: a detector of the embedded world's objects, and its answers as GenEval
detections.

A heat-map detector in the manner of Zhou, Wang and Krähenbühl, "Objects as Points" (2019,
arXiv:1904.07850): one 16 x 16 map per class whose peaks are object centres, with box and colour
read at the peak. Everything before the peaks is differentiable (``maps``), so the same network can
serve as a reward; as a judge it must not be what was optimised. 1.0 M parameters; about 1 ms an
image on one core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Json
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.tasks.geneval.verdict import Detection, Thresholds

SIDE, STRIDE, SPAN = 64, 4, 32
"""Side of the images of the first edition, pixels of a cell of the maps, and the unit of box sides,
in pixels."""

REACH = 5
"""A peak is the largest value of its class within a window of this many cells; objects of the world
are 8 cells wide."""


@dataclass(frozen=True)
class Maps:
    """What the network says about each cell."""

    # [B, 80, 16, 16] logits of an object's centre
    heat: Tensor
    # [B, 4, 16, 16]: offset of the centre from the cell's, width and height, in units of 32 pixels
    box: Tensor
    # [B, 11, 16, 16] logits of the ten colours and native
    colour: Tensor


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        result: Tensor = F.relu(x + self.norms[1](self.second(y)))
        return result


class JudgeNet(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] to ``Maps``; initial weights from ``seed`` without
    touching the global generator."""

    def __init__(
        self,
        width: int = 96,
        dilations: Sequence[int] = (1, 1, 2, 1, 2),
        neck: int = 160,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(
                *(nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
                *(nn.Conv2d(64, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            )
            self.blocks = nn.Sequential(*(_Block(width, dilation) for dilation in dilations))
            self.neck = nn.Sequential(nn.Conv2d(width, neck, 1), nn.ReLU())
            self.head = nn.Conv2d(neck, len(OBJECTS) + 4 + len(COLOURS) + 1, 1)
            bias = self.head.bias
            assert bias is not None
            nn.init.constant_(
                bias[: len(OBJECTS)], -5.0
            )  # start from "nothing anywhere", or the empty cells drown the first updates

    def forward(self, images: Tensor) -> Maps:
        output = self.head(self.neck(self.blocks(self.stem(images * 4 - 2))))
        output = output if output.dtype == torch.float64 else output.float()
        return Maps(*output.split((len(OBJECTS), 4, len(COLOURS) + 1), dim=1))


def checked(images: Tensor, owner: str, side: int = SIDE) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as float32 or float64 [B, 3, side, side]; other sizes are
    resized with antialiasing.

    Raises ValueError for another shape or another dtype; values are not looked at, which would
    force a device to wait.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{owner}: images must be [B, 3, H, W] in [0, 1]; got shape {list(images.shape)}."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{owner}: images must be floating point in [0, 1]; got {images.dtype}. Divide uint8 "
            "images by 255."
        )
    images = images if images.dtype == torch.float64 else images.float()
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(
        images, size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )


class Judge:
    """Detections of a trained network, with the thresholds at which its verdicts are to be read.

    ``thresholds`` were chosen once on validation scenes (see the model card); hand them to
    ``geneval.verdict``. Detections below ``floor`` are not returned. The network sees images of
    ``side`` pixels, the size of the edition that it was trained on.
    """

    def __init__(
        self, net: JudgeNet, thresholds: Thresholds, floor: float = 0.05, side: int = SIDE
    ) -> None:
        self.net, self.thresholds, self.floor = net.eval().requires_grad_(False), thresholds, floor
        self.side = side

    def maps(self, images: Tensor) -> Maps:
        """The differentiable part: images [B, 3, H, W] in [0, 1] to logits."""
        maps: Maps = self.net(checked(images, "emoji-judge", self.side))
        return maps

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Objects of each image, best first; boxes in pixels of the image as given. The colour is
        the best of the ten, never native."""
        maps = self.maps(images)
        heat = maps.heat.sigmoid()
        peak = (heat == F.max_pool2d(heat, REACH, 1, REACH // 2)) & (heat > self.floor)
        scale = (images.shape[3] / self.side, images.shape[2] / self.side)
        answers: list[list[Detection]] = [[] for _ in range(len(images))]
        for b, k, y, x in peak.nonzero().tolist():
            dx, dy, width, height = (maps.box[b, :, y, x] * SPAN).tolist()
            cx, cy = (x + 0.5) * STRIDE + dx, (y + 0.5) * STRIDE + dy
            edges = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            x1, y1, x2, y2 = (edge * scale[i % 2] for i, edge in enumerate(edges))
            colour = COLOURS[int(maps.colour[b, : len(COLOURS), y, x].argmax())]
            answers[b].append(
                Detection(OBJECTS[k], float(heat[b, k, y, x]), (x1, y1, x2, y2), colour)
            )
        return [
            sorted(detections, key=lambda detection: -detection.score) for detections in answers
        ]


def load_judge(folder: Path) -> Judge:
    """The judge saved in ``folder`` (config.json, model.safetensors) in fp32 on the CPU."""
    config: Json = json.loads((folder / "config.json").read_text())
    net = JudgeNet(**config["net"])
    weights = load_file(folder / "model.safetensors")
    net.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
        }
    )
    return Judge(net, Thresholds(**config["thresholds"]), side=config.get("side", SIDE))
