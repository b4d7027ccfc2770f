"""Parts of the loss of ``emoji-clip`` and the targets of its readers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS


def contrast(
    images: Tensor, texts: Tensor, spoilt: Tensor, scale: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """InfoNCE of unit embeddings [2P, D] of pictures and captions, mean of both directions, and the
    two-way choice within the pairs.

    ``spoilt`` [C, D] are pictures that match none of the captions; ``same`` [2P, 2P] marks pictures
    with equal facts, which are no negatives.
    """
    logits = scale * images @ texts.T
    masked = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(images))
    extra = scale * texts @ spoilt.T
    both = (
        F.cross_entropy(masked, target) + F.cross_entropy(torch.cat([masked.T, extra], 1), target)
    ) / 2
    partner = target ^ 1
    true = logits.diagonal()
    choice = (
        F.softplus(logits[target, partner] - true).mean()
        + F.softplus(logits[partner, target] - true).mean()
    )
    return both, choice / 2


def ranked(scores: Tensor, right: Tensor) -> Tensor:
    """Right above wrong within each group: mean softplus of wrong minus right over all such pairs.

    ``scores`` [G, n] of n pictures a group, ``right`` bool [G, n].
    """
    margin = scores[:, None, :] - scores[:, :, None]  # [group, right, wrong]
    return F.softplus(margin[right[:, :, None] & ~right[:, None, :]]).mean()


def chosen_right(scores: Tensor, right: Tensor) -> Tensor:
    """Minus the log of the chance that a picture drawn by the softmax of its group's ``scores``
    [G, n] is ``right`` (bool [G, n]), mean over the groups: what best-of-n needs. Every group must
    have a right picture."""
    right_scores = scores.masked_fill(~right, float("-inf"))
    return (scores.logsumexp(1) - right_scores.logsumexp(1)).mean()


def number_loss(logits: Tensor, numbers: Tensor) -> Tensor:
    """Cross entropy of ``logits`` [B, 80, K] and ``numbers`` [B, 80], for the classes in a scene
    and one absent class; all 80 would drown the few that matter."""
    present = numbers > 0
    absent = F.one_hot((numbers.argmax(1) + 37) % len(OBJECTS), len(OBJECTS)).bool() & ~present
    questions = present | absent
    return F.cross_entropy(logits[questions], numbers[questions])


def patch_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropies of class and of colour on every patch: ``logits`` [B, 64, 81 + 12]."""
    (kind, colour), split = patch_truth(truth), len(OBJECTS) + 1
    per_class = F.cross_entropy(logits[..., :split].transpose(1, 2), kind)
    return per_class + F.cross_entropy(logits[..., split:].transpose(1, 2), colour)


def patch_truth(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Truth float [B, 4, 6] to class and colour of each of the 64 patches, int64 [B, 64], row by
    row; 80 and 11 are background."""
    ticks = torch.arange(8) * 8 + 4.0
    x, y = (axis.flatten()[None, :, None] for axis in torch.meshgrid(ticks, ticks, indexing="xy"))
    x1, y1, x2, y2 = truth[:, None, :, 2:].unbind(-1)
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2) & (truth[:, None, :, 0] >= 0)
    row, covered = inside.float().argmax(-1), inside.any(-1)
    kind, colour = (truth[..., i].long().gather(1, row) for i in (0, 1))
    return torch.where(covered, kind, len(OBJECTS)), torch.where(covered, colour, len(COLOURS) + 1)


def scene_truth(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Truth [B, 4, 6] to the targets of ``Heads``: presence float [B, 80, 11] and numbers int64 [B,
    80]."""
    size = len(truth)
    presence, numbers = (
        torch.zeros(size, len(OBJECTS), len(COLOURS) + 1),
        torch.zeros(size, len(OBJECTS), dtype=torch.long),
    )
    image, row = (truth[..., 0] >= 0).nonzero(as_tuple=True)
    kind, colour = truth[image, row, 0].long(), truth[image, row, 1].long()
    presence[image, kind, colour] = 1
    numbers.index_put_((image, kind), torch.ones_like(kind), accumulate=True)
    return presence, numbers


def place_truth(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Truth [B, 4, 6] to the mean centre (x, y) of the objects of each class, from -1 to 1 across
    the picture, float [B, 80, 2], and which classes are there, bool [B, 80]."""
    image, row = (truth[..., 0] >= 0).nonzero(as_tuple=True)
    kind, box = truth[image, row, 0].long(), truth[image, row, 2:]
    total, number = torch.zeros(len(truth), len(OBJECTS), 2), torch.zeros(len(truth), len(OBJECTS))
    total.index_put_((image, kind), (box[:, :2] + box[:, 2:]) / 64 - 1, accumulate=True)
    number.index_put_((image, kind), torch.ones(len(kind)), accumulate=True)
    return total / number.clamp(min=1)[..., None], number > 0
