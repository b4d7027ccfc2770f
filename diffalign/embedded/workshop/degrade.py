"""Damage for the training of judges: what generated pictures look like when they are nearly right,
and when they are wrong.

Two kinds. *Tolerable* damage (``blurred``, ``noisy``, ``moved``, a noisy round trip through the
autoencoder) leaves the truth as it is. *Corruption* (``corrupt``) destroys the shape of some
objects but not their palette, so they no longer count as objects: without such examples a judge is
content with the right colours in the right place. All randomness comes from the given generator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.embedded.world.editions import FIRST, Edition
from diffalign.embedded.world.scenes import CELL

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

PATCH = 8


def _uniform(rng: torch.Generator, size: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(size, 1, 1, 1, generator=rng)


def _some(rng: torch.Generator, size: int, share: float) -> Tensor:
    return (torch.rand(size, 1, 1, 1, generator=rng) < share).float()


def blurred(images: Tensor, rng: torch.Generator, share: float = 0.3) -> Tensor:
    """A share of the images mixed, to a random part, with themselves after a Gaussian blur of 1.5
    pixels: [B, 3, 64, 64]."""
    ticks = torch.arange(-3, 4, dtype=images.dtype)
    kernel = torch.exp(-(ticks**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    soft = F.pad(images, (3, 3, 3, 3), mode="replicate")
    soft = F.conv2d(soft, kernel.view(1, 1, 1, 7).expand(3, 1, 1, 7), groups=3)
    soft = F.conv2d(soft, kernel.view(1, 1, 7, 1).expand(3, 1, 7, 1), groups=3)
    weight = _uniform(rng, len(images), 0.0, 1.0) * _some(rng, len(images), share)
    return images + weight * (soft - images)


def noisy(
    images: Tensor,
    rng: torch.Generator,
    share: float = 0.5,
    fine: float = 0.12,
    coarse: float = 0.08,
) -> Tensor:
    """A share of the images with white noise up to ``fine`` and smooth noise (8 x 8, enlarged)
    up to ``coarse``, in units of the range."""
    size = len(images)
    white = torch.randn(images.shape, generator=rng) * _uniform(rng, size, 0.0, fine)
    low = torch.randn(size, 3, 8, 8, generator=rng) * _uniform(rng, size, 0.0, coarse)
    smooth = F.interpolate(low, size=images.shape[2:], mode="bilinear", align_corners=False)
    return images + (white + smooth) * _some(rng, size, share)


def moved(
    images: Tensor, boxes: Tensor, rng: torch.Generator, share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A share of the images enlarged by .9 to 1.12 and shifted by up to 3 pixels, with their boxes
    float [B, 4, 4] (x1, y1, x2, y2)."""
    size, side = len(images), images.shape[3]
    pick = _some(rng, size, share).view(size, 1)
    zoom = 1 + (_uniform(rng, size, -0.1, 0.12).view(size, 1)) * pick
    shift = (6 * torch.rand(size, 2, generator=rng) - 3) * pick
    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = (1 / zoom).squeeze(1)
    theta[:, :, 2] = -shift * 2 / side / zoom
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    centre = side / 2
    corners = (
        (boxes.view(size, -1, 2, 2) - centre) * zoom.view(size, 1, 1, 1)
        + centre
        + shift.view(size, 1, 1, 2)
    )
    return out, corners.view(boxes.shape).clamp(0, side)


def corrupt(
    images: Tensor,
    truth: Tensor,
    rng: torch.Generator,
    share: float = 0.2,
    edition: Edition = FIRST,
) -> tuple[Tensor, Tensor]:
    """In a share of the images one object loses its shape, in one of three ways; its truth row is
    set to -1 (it is no object any more).

    ``truth`` int64 [B, N, 6] as ``World.arrays`` gives it. Ways: the 8 x 8 patches of its cell are
    shuffled; the cell becomes a smooth blob of its palette; or, where the scene holds another
    class, the lower halves of the two objects are exchanged (then both are lost).
    """
    images, truth = images.clone(), truth.clone()
    for index in (torch.rand(len(images), generator=rng) < share).nonzero().flatten().tolist():
        rows = (truth[index, :, 0] >= 0).nonzero().flatten()
        order = rows[torch.randperm(len(rows), generator=rng)].tolist()
        way = int(torch.randint(3, (1,), generator=rng))
        first = _cell(images[index], truth[index, order[0]], edition)
        side = first.shape[-1]
        shuffle = torch.randperm((side // PATCH) ** 2, generator=rng)
        others = [row for row in order[1:] if truth[index, row, 0] != truth[index, order[0], 0]]
        if way == 0 and others:
            _exchange(first, _cell(images[index], truth[index, others[0]], edition))
            truth[index, others[0]] = -1
        elif way == 1:
            small = F.avg_pool2d(first[None], PATCH)
            first.copy_(_resized(small[0], (side, side)))
        else:
            steps = side // PATCH
            patches = (
                first.reshape(3, steps, PATCH, steps, PATCH)
                .permute(1, 3, 0, 2, 4)
                .flatten(0, 1)[shuffle]
            )
            first.copy_(
                patches.view(steps, steps, 3, PATCH, PATCH)
                .permute(2, 0, 3, 1, 4)
                .reshape(3, side, side)
            )
        truth[index, order[0]] = -1
    return images, truth


def _corner(row: Tensor) -> tuple[int, int]:
    """Left and top of an object's cell in steps of 8 pixels: the place whose centre is nearest to
    the box's, at most 4 pixels away."""
    x1, y1, x2, y2 = row[2:].tolist()
    left, top = (
        min(max(round(((low + high) / 2 - CELL / 2) / PATCH), 0), 4)
        for low, high in ((x1, x2), (y1, y2))
    )
    return left, top


def _cell(image: Tensor, row: Tensor, edition: Edition = FIRST) -> Tensor:
    """View [3, side, side] of the object's cell; at free places the square of a multiple of 8
    pixels that holds its box, as far as possible around it."""
    if edition is FIRST:
        left, top = (place * PATCH for place in _corner(row))
        return image[:, top : top + CELL, left : left + CELL]
    x1, y1, x2, y2 = row[2:].tolist()
    side = PATCH * -(-max(x2 - x1, y2 - y1) // PATCH)
    left, top = (
        min(max((low + high - side) // 2, 0), edition.side - side)
        for low, high in ((x1, x2), (y1, y2))
    )
    return image[:, top : top + side, left : left + side]


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, h, w] as [3, *size]."""
    return F.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]


def _exchange(first: Tensor, second: Tensor) -> None:
    """Exchange the lower halves of two cells in place, resized where the cells differ."""
    halves = [cell[:, cell.shape[1] // 2 :] for cell in (first, second)]
    copies = [half.clone() for half in halves]
    for half, other in zip(halves, copies[::-1], strict=True):
        size = (half.shape[1], half.shape[2])
        half.copy_(other if other.shape == half.shape else _resized(other, size))


@torch.no_grad()
def round_trip(
    vae: AutoencoderTiny,
    images: Tensor,
    rng: torch.Generator,
    spread: float,
    *,
    exact: bool = False,
) -> Tensor:
    """Images in [0, 1] encoded, disturbed by latent noise, decoded and clamped. The noise has a
    standard deviation of ``spread`` (``exact``), or one drawn per image from 0 to ``spread``,
    where the latents have one of about 1."""
    dtype = next(vae.parameters()).dtype
    latents = vae.encoder((images * 2 - 1).to(dtype)).float()
    latents = latents + torch.randn(latents.shape, generator=rng) * (
        spread if exact else _uniform(rng, len(images), 0.0, spread)
    )
    decoded: Tensor = vae.decoder(latents.to(dtype)).float()
    return (decoded / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def morph(vae: AutoencoderTiny, images: Tensor, truth: Tensor, rng: torch.Generator) -> Tensor:
    """Each image with one object spoilt in the latent space, decoded: its latent cells are mixed
    half and half with those of an object of the next image, or flooded with noise of 1 to 2
    standard deviations. This is how generators fail. Shapes as in ``corrupt``."""
    dtype = next(vae.parameters()).dtype
    latents = vae.encoder((images * 2 - 1).to(dtype)).float()
    spoilt = latents.clone()
    size, reach = len(images), CELL // PATCH
    places = []
    for index in range(size):
        rows = (truth[index, :, 0] >= 0).nonzero().flatten()
        row = rows[int(torch.randint(len(rows), (1,), generator=rng))]
        places.append(_corner(truth[index, row]))
    for index, (left, top) in enumerate(places):
        cell = spoilt[index, :, top : top + reach, left : left + reach]
        if int(torch.randint(2, (1,), generator=rng)):
            x, y = places[(index + 1) % size]
            other = latents[(index + 1) % size, :, y : y + reach, x : x + reach]
            weight = 0.35 + 0.3 * float(torch.rand(1, generator=rng))
            cell.lerp_(other, weight)
        else:
            cell.add_(
                torch.randn(cell.shape, generator=rng),
                alpha=1 + float(torch.rand(1, generator=rng)),
            )
    decoded: Tensor = vae.decoder(spoilt.to(dtype)).float()
    return (decoded / 2 + 0.5).clamp(0, 1)
