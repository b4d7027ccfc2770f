"""How far the two branches are apart and how strongly each step was guided, kept on the device until the run ends."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.core.checks import rowwise


class BranchLog:
    """Per step: effective scale <d - d_n, d_c - d_n> / |d_c - d_n|^2, the part of d - d_n off that line relative to it, and the cosine."""

    def __init__(self) -> None:
        self._products: dict[int, Tensor] = {}

    @torch.no_grad()
    def record(self, index: int, cond: Tensor, uncond: Tensor, guided: Tensor, pair: tuple[Tensor, Tensor] | None) -> None:
        """Predictions [B, ...] of one step; ``pair``: both branches in the space of the cosine, None where that is the native one."""
        vectors = torch.stack((rowwise(cond), rowwise(uncond), rowwise(guided)), dim=1)
        moves = vectors[:, ::2] - vectors[:, 1:2]
        branches = vectors[:, :2] if pair is None else torch.stack((rowwise(pair[0]), rowwise(pair[1])), dim=1)
        self._products[index] = torch.cat((moves @ moves.mT, branches @ branches.mT), dim=1)

    def columns(self, steps: int) -> tuple[list[float | None], list[float | None], list[float | None]]:
        """Scale, orthogonal part and cosine, one entry per step, means over images, None where one branch ran. One transfer for all."""
        found = dict(zip(self._products, self._means()))
        scale, orthogonal, cosine = ([found[s][i] if s in found else None for s in range(steps)] for i in range(3))
        return scale, orthogonal, cosine

    def _means(self) -> list[list[float]]:
        if not self._products:
            return []
        products = list(self._products.values())
        p = torch.cat(products).cpu().double()  # [images of all steps, 4, 2]: inner products of (d_c - d_n, d - d_n), then of (d_c, d_n)
        square = p[:, 0, 0].clamp_min(1e-30)
        scale = p[:, 0, 1] / square
        orthogonal = (p[:, 1, 1] / square - scale.square()).clamp_min(0).sqrt()
        cosine = p[:, 2, 1] / (p[:, 2, 0] * p[:, 3, 1]).sqrt().clamp_min(1e-30)
        parts = torch.split(torch.stack((scale, orthogonal, cosine), dim=1), [len(q) for q in products])
        means: list[list[float]] = torch.stack([part.mean(0) for part in parts]).tolist()
        return means
