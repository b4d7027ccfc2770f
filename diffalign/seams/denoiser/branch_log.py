"""How far the two branches are apart and how strongly each step was guided, kept on the device
until the run ends."""

from __future__ import annotations

import torch
from torch import Tensor

PENDING = 1 << 20
"""Values that may wait before they are reduced: small latents are reduced all at once at the end of
the run, large ones at every step."""


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
        moves = v[:, 0:3:2] - v[:, 1:2]
        branches = v[:, -2:] if v.shape[1] == 5 else v[:, :2]
        self._products.append(torch.cat((moves @ moves.mT, branches @ branches.mT), dim=1))

    def columns(
        self, steps: int
    ) -> tuple[list[float | None], list[float | None], list[float | None]]:
        """Scale, orthogonal part and cosine, one entry per step, means over images, None where one
        branch ran. One transfer for all."""
        found = dict(zip(self._steps, self._means()))
        scale, orthogonal, cosine = (
            [found[s][i] if s in found else None for s in range(steps)] for i in range(3)
        )
        return scale, orthogonal, cosine

    @torch.no_grad()
    def _means(self) -> list[list[float]]:
        self._reduce()
        if not self._products:
            return []
        p = (
            torch.cat(self._products).cpu().double()
        )  # [images of all steps, 4, 2]: inner products of (d_c - d_n, d - d_n), then of (d_c, d_n)
        square = p[:, 0, 0].clamp_min(1e-30)
        scale = p[:, 0, 1] / square
        orthogonal = (p[:, 1, 1] / square - scale.square()).clamp_min(0).sqrt()
        cosine = p[:, 2, 1] / (p[:, 2, 0] * p[:, 3, 1]).sqrt().clamp_min(1e-30)
        images, values = list(self._steps.values()), torch.stack((scale, orthogonal, cosine), dim=1)
        if min(images) == max(images):
            of_steps = values.view(len(images), images[0], 3).mean(1)
        else:
            of_steps = torch.stack([part.mean(0) for part in torch.split(values, images)])
        means: list[list[float]] = of_steps.tolist()
        return means
