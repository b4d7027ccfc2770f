"""What a choice of tokens is made from: how far the prediction of each has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffalign.core import Tensor


@dataclass(frozen=True, slots=True)
class Movement:
    """How the prediction of each image token has moved; None until the steps that it needs."""

    # the prediction two steps before the first pruned one, and the last one [B, N, p]
    reference: Tensor | None = None
    latest: Tensor | None = None
    # the region of each token [B, N]
    labels: Tensor | None = None
    # how often each token was computed, halved at every step, and how often it was left out [B, N]
    visits: Tensor | None = None
    drops: Tensor | None = None
    # steps that have left tokens out
    rounds: int = 0

    def select(self, rows: Sequence[int]) -> Movement:
        """The movement of those images, in that order."""

        def take(x: Tensor | None) -> Tensor | None:
            return x if x is None else x[list(rows)]

        return replace(
            self,
            reference=take(self.reference),
            latest=take(self.latest),
            labels=take(self.labels),
            visits=take(self.visits),
            drops=take(self.drops),
        )
