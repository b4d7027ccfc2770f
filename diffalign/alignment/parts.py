"""Work of a sampler on any number of images, in batches that the memory holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.alignment.scoring import Fit
from diffalign.core.sampler import Sampler, State, join


def part_of(state: State, part: range) -> State:
    """Those images of a state; the state itself for all of them."""
    return state if len(part) == len(state.latents) else state.select(part)


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
    rows = len(state.latents)
    pairs = list(fit.parts(rows, lambda part: sampler.twist(part_of(state, part), reward)))
    scores = torch.cat([score for score, _ in pairs]).to("cpu", torch.float64)
    return scores, torch.cat([gradient for _, gradient in pairs])


def decode_in_parts(sampler: Sampler, fit: Fit, state: State) -> Tensor:
    """``sampler.decode`` in parts: images [B, 3, H, W]."""
    rows = len(state.latents)
    return torch.cat(list(fit.parts(rows, lambda part: sampler.decode(part_of(state, part)))))
