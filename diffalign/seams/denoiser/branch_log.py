"""How far the two branches are apart and how strongly each step was guided, kept on the device
until the run ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PENDING = 1 << 20
"""Values that may wait before they are reduced: small latents are reduced all at once at the end of
the run, large ones at every step."""


ROUNDING = 1e-6
"""Branches closer than this, relative to their size, agree up to rounding."""


class BranchLog:
    """Per step: effective scale <d - d_n, d_c - d_n> / |d_c - d_n|^2, the part of d - d_n off that
    line relative to it, and the cosine."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor]] = []
        self._steps: dict[int, int] = {}
        self._products: list[Tensor] = []

    def record(
        self,
        index: int,
        cond: Tensor,
        uncond: Tensor,
        guided: Tensor,
        pair: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Predictions [B, ...] of one step; ``pair``: both branches in the space of the cosine,
        None where that is the native one."""
        # copied, since a compiled model may write its next prediction over this one
        vectors = torch.stack(
            (cond, uncond, guided) if pair is None else (cond, uncond, guided, *pair)
        )
        if vectors.requires_grad:
            vectors = vectors.detach()
        if self._waiting and self._waiting[0][1].shape[2:] != vectors.shape[2:]:
            self._reduce()  # other tokens than before
        self._steps[index] = vectors.shape[1]
        self._waiting.append((index, vectors))
        if len(self._waiting) * vectors.numel() > PENDING:
            self._reduce()

    def _reduce(self) -> None:
        if not self._waiting:
            return
        v = (
            torch.cat([vectors for _, vectors in self._waiting], dim=1)
            .float()
            .flatten(2)
            .transpose(0, 1)
        )  # [images of all steps, 3 or 5, n]
        self._waiting.clear()
        moves = torch.cat((v[:, 0:3:2] - v[:, 1:2], v[:, 1:2]), dim=1)  # c - n, g - n, n
        branches = v[:, -2:] if v.shape[1] == 5 else v[:, :2]
        m, b = moves @ moves.mT, branches @ branches.mT
        parts = (m[:, 0, 0], m[:, 0, 1], m[:, 1, 1], m[:, 2, 2], b[:, 0, 0], b[:, 0, 1], b[:, 1, 1])
        self._products.append(torch.stack(parts, dim=1))

    def columns(
        self, steps: int
    ) -> tuple[list[float | None], list[float | None], list[float | None]]:
        """Scale, orthogonal part and cosine, one entry per step, means over images.

        None where one branch ran alone, for scale and orthogonal part also where the branches agree
        up to rounding, and for the cosine where one is zero. One transfer from the device for all.
        """
        if not steps:
            return [], [], []
        columns = dict(zip(self._steps, self._means()))
        none = (None, None, None)
        scale, orthogonal, cosine = zip(
            *(columns.get(step, none) for step in range(steps)), strict=True
        )
        return list(scale), list(orthogonal), list(cosine)

    @torch.no_grad()
    def _means(self) -> list[tuple[float | None, ...]]:
        self._reduce()
        if not self._products:
            return []
        # inner products of each image of all steps: of c - n, g - n and n, then of the two branches
        products = torch.cat(self._products).cpu().double()
        square, along, guided, uncond, first, across, second = products.unbind(1)
        # where the branches differ by rounding alone there is no direction to measure against
        apart = square > ROUNDING**2 * uncond
        square = square.where(apart, torch.nan)
        scale = along / square
        orthogonal = (guided / square - scale.square()).clamp_min(0).sqrt()
        sizes = (first * second).sqrt()
        cosine = across / sizes.where(sizes > 0.0, torch.nan)  # nothing has no direction
        values = torch.stack((scale, orthogonal, cosine), dim=1)
        means = [part.nanmean(0) for part in torch.split(values, list(self._steps.values()))]
        return [
            tuple(None if math.isnan(value) else value for value in mean)
            for mean in torch.stack(means).tolist()
        ]
