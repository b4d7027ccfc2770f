"""Uncertainty of a mean of tag means: the unit of resampling is the prompt with all its images,
stratified by tag.

Efron and Tibshirani 1993, chapter 16 (paired and stratified resampling); percentile intervals.
numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interval:
    """``mean`` with the percentile interval [``low``, ``high``] at ``level``; ``prompts``
    resampled, ``draws`` times.

    ``p``: two-sided bootstrap p value of mean 0, at least 1 / draws. Only meaningful for
    differences.
    """

    mean: float
    low: float
    high: float
    p: float
    prompts: int
    draws: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(
    values: Sequence[float],
    tags: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap of the mean over tags of the mean over prompts. ``values``: one number per prompt,
    its images averaged; ``tags``: its tag.

    For a paired comparison pass per-prompt differences. Cost: draws x prompts multiplications,
    about 0.1 s for 200 prompts.

    Raises: ValueError for unequal lengths or nothing to resample.
    """
    if len(values) != len(tags) or not len(values):
        raise ValueError(
            f"interval needs one tag per value and at least one value; got {len(values)} values "
            f"and {len(tags)} tags."
        )
    data, names = np.asarray(values, dtype=np.float64), np.asarray(tags)
    rng = np.random.default_rng(seed)
    total: NDArray[np.float64] = np.zeros(draws)
    mean = 0.0
    strata = sorted(set(tags))
    for tag in strata:
        group = data[names == tag]
        # how often each prompt is drawn is multinomial, so no loop over draws
        counts = rng.multinomial(len(group), np.full(len(group), 1.0 / len(group)), size=draws)
        total += counts @ group / len(group)
        mean += float(group.mean())
    total /= len(strata)
    tail = 100.0 * (1.0 - level) / 2.0
    low, high = np.percentile(total, [tail, 100.0 - tail])
    p = 2.0 * min(float((total <= 0).mean()), float((total >= 0).mean()))
    return Interval(
        mean / len(strata),
        float(low),
        float(high),
        min(max(p, 1.0 / draws), 1.0),
        len(data),
        draws,
        level,
    )


def holm(values: Sequence[float]) -> list[float]:
    """P values of several comparisons, corrected by Holm 1979: the smallest times their number, the
    next times one less, and none below one before it; at most 1."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, floor = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, values[i] * (len(values) - rank)))
        corrected[i] = floor
    return corrected


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p value of McNemar 1947: how unlikely so unequal numbers of images that only
    one of two runs gets right are, if both are as good. It takes images for independent."""
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**total))
