"""S2-Guidance: away from a random sub-network of the same model (Chen et al. 2025,
arXiv:2508.12880)."""

import dataclasses
import random
from dataclasses import dataclass
from typing import ClassVar, Self

from diffalign.core import Context, UnsupportedModel
from diffalign.guidance.skipping import SkippedBlocks


@dataclass(frozen=True, slots=True)
class S2Guidance(SkippedBlocks):
    """CFG plus ``omega * (cond - skipped)``, where ``skipped`` is the conditional model without
    ``n_drop`` blocks drawn afresh each step.

    Chen et al. 2025, arXiv:2508.12880, eq. 4 (the appendix, eq. 20, loses a term: its weights sum
    to 1 - omega). ``scale``: 1 is off for the CFG part, None the pipeline's own value. ``omega``: 0
    is off; 0.25 in every setting of the paper. ``n_drop``: blocks per step; 1 was best of 0 to 4 on
    the 24 blocks of SD3.5 (table 4), though the text says about 10%. The window is the central 80%
    of the steps, as ``start``, ``stop``, or ``sigma=(lo, hi)`` instead. ``blocks``: names,
    positions or patterns to draw from; None is all but the first, the last and those that drop a
    stream (the paper excludes "critical" blocks without naming them). ``seed``: of the draw, which
    never touches the image's generator; equal seeds give equal blocks at each step index, for all
    images of the batch.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    """

    push_name: ClassVar[str] = "omega"
    omega: float = dataclasses.field(default=0.25, kw_only=True)
    n_drop: int = dataclasses.field(default=1, kw_only=True)
    seed: int = dataclasses.field(default=0, kw_only=True)
    blocks: tuple[int | str, ...] | None = dataclasses.field(default=None, kw_only=True)
    start: float = dataclasses.field(default=0.1, kw_only=True)
    stop: float = dataclasses.field(default=0.9, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.n_drop, bool) or not isinstance(self.n_drop, int) or self.n_drop < 0:
            raise ValueError(
                f"S2Guidance(n_drop=...) must be an integer of at least 0; got {self.n_drop!r}."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"S2Guidance(seed=...) must be an integer; got {self.seed!r}.")
        if self.blocks is not None and not self.blocks:
            raise ValueError("S2Guidance(blocks=...) must name at least one block; got ().")
        SkippedBlocks.__post_init__(self)

    def chosen(self, index: int) -> tuple[str, ...]:
        """``n_drop`` distinct blocks, uniformly: a function of the seed and the step alone, so that
        a resumed run draws the same."""
        rng = random.Random(f"{self.seed}/{index}")
        order = sorted(range(len(self.names)), key=lambda _: rng.random())
        return tuple(self.names[i] for i in sorted(order[: self.n_drop]))

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        made, sources = self.with_names(context, "blocks", self.blocks)
        if self.n_drop > len(made.names):
            raise UnsupportedModel(
                f"S2Guidance(n_drop={self.n_drop}): only {len(made.names)} blocks may be skipped: "
                f"{', '.join(made.names)}."
            )
        return made, sources
