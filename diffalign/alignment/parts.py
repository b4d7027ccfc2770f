"""Work of a sampler on any number of images, in batches that the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from diffalign.alignment.scoring import Fit
from diffalign.core.sampler import Sampler, State, join

T = TypeVar("T")


def in_parts(fit: Fit, state: State, work: Callable[[State], T]) -> Iterator[T]:
    """``work`` on the images of a state, in parts that fit; on the state itself where all do."""
    rows = len(state.latents)
    return fit.parts(rows, lambda part: work(state if len(part) == rows else state.select(part)))


def run_in_parts(
    sampler: Sampler, fit: Fit, state: State, until: int | None, drift: Tensor | None
) -> State:
    """``sampler.run`` in parts of at most ``fit.size`` images; out of memory halves the size.

    A batch that fits is run as it is, so its bits are those of a call with these images.
    """
    rows = len(state.latents)
    if rows <= fit.size:
        try:
            return sampler.run(state, until, drift)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            fit.size = (rows + 1) // 2
            torch.cuda.empty_cache()
    parts = [range(first, min(first + fit.size, rows)) for first in range(0, rows, fit.size)]
    shifts = [None if drift is None else drift[list(part)] for part in parts]
    return join(
        [
            run_in_parts(sampler, fit, state.select(part), until, shift)
            for part, shift in zip(parts, shifts)
        ]
    )


def twist_in_parts(
    sampler: Sampler, fit: Fit, state: State, reward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """``sampler.twist`` in parts: scores [B], float64 on the CPU, and gradients [B, ...]."""
    pairs = list(in_parts(fit, state, lambda part: sampler.twist(part, reward)))
    scores = torch.cat([score for score, _ in pairs]).to("cpu", torch.float64)
    return scores, torch.cat([gradient for _, gradient in pairs])


def decode_in_parts(sampler: Sampler, fit: Fit, state: State) -> Tensor:
    """``sampler.decode`` in parts: images [B, 3, H, W]."""
    return torch.cat(list(in_parts(fit, state, sampler.decode)))
