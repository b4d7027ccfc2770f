"""The loss of ``emoji-judge``: penalty-reduced focal loss on the heat-maps, L1 on the boxes,
cross-entropy on the colours.

Law and Deng, "CornerNet: Detecting Objects as Paired Keypoints" (2018, arXiv:1808.01244), eq. 1, as
used by Zhou et al. (2019, arXiv:1904.07850), eq. 1, with alpha 2 and beta 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.embedded.nets.judge import SPAN, STRIDE, Maps

SIGMA = 1.0
"""Width of a target peak in cells; objects are 8 cells wide."""


def heat_targets(truth: Tensor, classes: int, side: int) -> tuple[Tensor, Tensor]:
    """Truth float [B, 4, 6] (class, colour, x1, y1, x2, y2) to target maps [B, classes, side, side]
    in [0, 1] and the cell (row, column) of each object's centre, int64 [B, 4, 2]. The target is 1
    at that cell and falls off as a Gaussian around it; rows of class -1 have no peak."""
    centre = (
        torch.stack(
            [(truth[..., 3] + truth[..., 5]) / 2, (truth[..., 2] + truth[..., 4]) / 2], dim=-1
        )
        / STRIDE
    )
    cell = centre.floor().clamp(0, side - 1).long()
    ticks = torch.arange(side, dtype=torch.float32)
    rows, columns = (
        torch.exp(-((ticks - cell[..., i, None]) ** 2) / (2 * SIGMA**2)) for i in (0, 1)
    )
    peaks = rows[..., :, None] * columns[..., None, :] * (truth[..., 0] >= 0)[..., None, None]
    heat = torch.zeros(len(truth), classes, side, side)
    every = torch.arange(len(truth))
    for slot in range(truth.shape[1]):
        kind = truth[:, slot, 0].long().clamp(min=0)
        heat[every, kind] = torch.maximum(heat[every, kind], peaks[:, slot])
    return heat, cell


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over all cells divided by the number of objects (at least 1)."""
    chance = logits.sigmoid()
    full = target == 1
    hit = -((1 - chance) ** 2) * F.logsigmoid(logits)
    miss = -((1 - target) ** 4) * chance**2 * F.logsigmoid(-logits)
    return torch.where(full, hit, miss).sum() / full.sum().clamp(min=1)


def judge_loss(maps: Maps, truth: Tensor) -> dict[str, Tensor]:
    """The weighted parts: heat, box (L1 in units of 32 pixels) and colour, the last two over the 3
    x 3 cells around each centre."""
    side = maps.heat.shape[-1]
    heat, cell = heat_targets(truth, maps.heat.shape[1], side)
    image, slot = (truth[..., 0] >= 0).nonzero(as_tuple=True)
    around = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    place = (cell[image, slot][:, None] + around).clamp(0, side - 1)  # [n, 9, 2]
    rows, columns, which = (
        place[..., 0].flatten(),
        place[..., 1].flatten(),
        image.repeat_interleave(9),
    )
    thing = truth[image, slot].repeat_interleave(9, 0)
    x1, y1, x2, y2 = thing[:, 2:].unbind(1)
    offsets = ((x1 + x2) / 2 - (columns + 0.5) * STRIDE, (y1 + y2) / 2 - (rows + 0.5) * STRIDE)
    want = torch.stack([*offsets, x2 - x1, y2 - y1], dim=1) / SPAN
    box = (maps.box[which, :, rows, columns] - want).abs().sum() / max(1, len(thing))
    colour = F.cross_entropy(
        maps.colour[which, :, rows, columns], thing[:, 1].long(), reduction="sum"
    ) / max(1, len(thing))
    return {"heat": focal(maps.heat, heat), "box": 2 * box, "colour": 0.5 * colour}
