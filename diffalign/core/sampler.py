"""A trajectory in segments: everything that it is between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from diffalign.core.rows import Rows, select_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class State:
    """A batch of images between two evaluations of the model; it may be kept, copied and resumed.

    Nothing in it changes while it is run: the same state run twice gives the same images.
    """

    # [B, ...] as the pipeline takes them as ``latents=``
    latents: Tensor
    # evaluations made, in [0, count]
    step: int
    # evaluations of the whole trajectory
    count: int
    # per image, the state of its random generator
    rng: tuple[Tensor, ...]
    # history of the scheduler, None before the first step
    scheduler: Rows | None = None
    # technique -> its state, None for one that remembers nothing
    techniques: Mapping[str, Rows | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.count

    def select(self, rows: Sequence[int]) -> State:
        """The state of those images, in that order; an image may appear more than once."""
        techniques = self.techniques or {}
        return replace(
            self,
            latents=self.latents[list(rows)],
            rng=tuple(self.rng[row] for row in rows),
            scheduler=select_rows(self.scheduler, rows),
            techniques={name: select_rows(state, rows) for name, state in techniques.items()},
        )


class Sampler(Protocol):
    """Runs trajectories of one pipeline and prompt, whole or in segments, techniques active."""

    def start(self, noise: Tensor, seeds: Sequence[int]) -> State:
        """The state before the first step. ``noise`` [B, ...]; ``seeds``: one per image."""
        ...

    def run(self, state: State, until: int | None = None) -> State:
        """Continue to evaluation ``until``, None for the end. ``state`` is not changed."""
        ...

    def decode(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of a finished state."""
        ...
