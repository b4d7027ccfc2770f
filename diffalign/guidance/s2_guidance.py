"""S2-Guidance: away from a random sub-network of the same model."""

import random
from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import Context, UnsupportedModel, option
from diffalign.guidance.skipping import SkippedBlocks


@dataclass(frozen=True, slots=True)
class S2Guidance(SkippedBlocks):
    """Adds ``omega * (cond - skipped)`` to CFG, ``skipped`` without blocks that each step draws.

    Chen et al. 2025, arXiv:2508.12880, eq. 4 (the appendix, eq. 20, loses a term: its weights sum
    to 1 - omega). The default window is the central 80% of the steps. The draw never touches the
    image's generator; equal seeds give equal blocks at each step index, for all images of the
    batch.
    Differs from the paper: it excludes "critical" blocks without naming them; here the first block,
    the last and those that drop a stream are left in.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    Raises: ``UnsupportedModel`` on models whose blocks are not known.
    """

    _: KW_ONLY
    omega: float = option(
        0.25, "weight of the skipped pass; 0 is off, 0.25 in the paper", usual=(0.0, 1.0)
    )
    n_drop: int = option(
        1,
        "blocks per step; 1 was best of 0 to 4 on SD3.5 (table 4), though the text says about 10%",
        low=0,
        usual=(0, 8),
    )
    seed: int = option(0, "seed of the draw")
    blocks: tuple[int | str, ...] | None = option(
        None, "names, positions or patterns to draw from; none is all but the edges", nonempty=True
    )
    start: float = option(
        0.1, "first step that acts, as a fraction of the steps", low=0.0, high=1.0
    )
    stop: float = option(
        0.9, "first step that no longer acts, as a fraction of the steps", low=0.0, high=1.0
    )

    @property
    def push(self) -> float:
        return self.omega

    def blocks_at(self, index: int) -> tuple[str, ...]:
        """``n_drop`` distinct blocks, uniformly: a function of the seed and the step alone, so that
        a resumed run draws the same."""
        rng = random.Random(f"{self.seed}/{index}")
        order = sorted(range(len(self.names)), key=lambda _: rng.random())
        return tuple(self.names[i] for i in sorted(order[: self.n_drop]))

    def resolve(self, context: Context) -> Self:
        resolved = self.with_names(context, "blocks", self.blocks)
        if self.n_drop > len(resolved.names):
            raise UnsupportedModel(
                f"S2Guidance(n_drop={self.n_drop}): only {len(resolved.names)} blocks may be "
                f"skipped: {', '.join(resolved.names)}."
            )
        return resolved
