"""The Fréchet distance between two sets of images in the features of an encoder (Heusel et al.
2017, arXiv:1706.08500, eq. 6): a technique that trades realism or diversity for a score shows here.

It is FID only where the encoder is Inception-v3; it carries the name of its encoder, and depends
on the number of images. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frechet:
    """A distance with the percentile interval over resampled sets."""

    distance: float
    low: float
    high: float
    # images of each set
    images: tuple[int, int]
    draws: int


def frechet(a: Features, b: Features, *, draws: int = 200, seed: int = 0) -> Frechet:
    """Distance of features [N, D] and [M, D], and where 95% of it fall when both sets are drawn
    again with replacement.

    A resampled set repeats images, so its distances lie higher on the whole: the interval shows how
    far the number is to be trusted, not where the true one lies. Cost: ``draws`` decompositions of
    D x D matrices. Raises: ValueError for sets of fewer than two images or of other widths.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "frechet needs features [N, D] and [M, D] of at least two images each; got shapes "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    rng = np.random.default_rng(seed)
    values = [
        distance(a[rng.integers(len(a), size=len(a))], b[rng.integers(len(b), size=len(b))])
        for _ in range(draws)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return Frechet(distance(a, b), float(low), float(high), (len(a), len(b)), draws)


def distance(a: Features, b: Features) -> float:
    """|mean difference|^2 + trace(A + B - 2 sqrt(A B)) of means and covariances."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second @ root)
    means = a.mean(0) - b.mean(0)
    trace = np.trace(first) + np.trace(second) - 2.0 * np.sqrt(product.clip(min=0.0)).sum()
    return float(max(means @ means + trace, 0.0))
