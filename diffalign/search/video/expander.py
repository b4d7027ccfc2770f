"""An expander: it makes a video chunk after chunk, so that a search may branch between chunks.

``choice.expander_of(pipe, techniques, meter, chunks=..., **call)`` makes the one of a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.core import Meter


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The first chunks of a video. Prefixes of one tree share the tensors of the chunks that they
    have in common, so each chunk is stored once."""

    # per chunk what the pipeline goes on from: latents [C, T, h, w] or frames [T, 3, H, W], CPU
    pieces: tuple[Tensor, ...]
    # number of each chunk among its siblings: the name of the node, unique within a tree
    path: tuple[int, ...]
    # per chunk the seed that made it, None for a chunk of a clip of the user's
    seeds: tuple[int | None, ...]

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A chunk to be made, behind ``prefix`` (None: the first one), by ``seed``."""

    prefix: Prefix | None
    seed: int
    # its number among its siblings, the last entry of the path of what it becomes
    number: int = 0
    # evaluations of the model made already, and the latents after them; ``Expander.preview`` sets
    # both where the pipeline can go on from there
    step: int = 0
    latents: Tensor | None = None

    @property
    def chunk(self) -> int:
        """Index of the chunk."""
        return 0 if self.prefix is None else self.prefix.chunks


@dataclass(frozen=True, slots=True)
class Price:
    """What making one chunk of one video costs at most."""

    # rows that enter the denoiser, those of context included
    rows: int
    # rows times the chunks of video that each of them covers: the measure of compute for pipelines
    # whose call takes the prefix through the denoiser again
    forwards: float


class Expander(Protocol):
    """One pipeline and one prompt; run it in a ``with`` block, in which techniques are active.

    Equal prefixes and seeds give equal chunks. A prefix is never changed.
    """

    # counts rows and decodes, and ends a run whose budget is used up
    meter: Meter
    # evaluations of the model that make one chunk, where its schedule is that of one clip
    count: int

    @property
    def partition(self) -> tuple[int, ...]:
        """Frames that each chunk adds to the video; its length is the number of chunks."""
        ...

    @property
    def exact_prefix(self) -> bool:
        """Whether the pipeline goes on from the very prefix; else it reads it through its decoder
        and encoder again, or sees its last frames only."""
        ...

    @property
    def previews(self) -> bool:
        """Whether ``preview`` works."""
        ...

    @property
    def first_look(self) -> int:
        """The first evaluation after which it does."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def noise(self, chunk: int, seed: int) -> Tensor:
        """Start noise [C, T, h, w] of a chunk by its seed, which ``Branch.latents`` may be instead.

        Raises: ``UnsupportedModel`` where a call cannot be given it.
        """
        ...

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        """What evaluations ``first`` to ``last`` (None: all) of chunk ``chunk`` cost at most, for
        one video. It is known before any compute."""
        ...

    def expand(self, branches: Sequence[Branch]) -> list[Prefix]:
        """The prefixes with one more chunk, in the order of ``branches``, in one call of the
        pipeline where it takes several videos. All branches must be at one chunk and step.

        Raises: ValueError for branches of several lengths, or behind the last chunk.
        """
        ...

    def preview(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """Run to evaluation ``step`` of the chunk and look ahead: the branches as they are then,
        each with the frames [T, 3, H, W] in [0, 1] that the model predicts for the chunk.

        Where the pipeline cannot go on from there, the branch stays as it was and ``expand``
        begins anew; ``price`` says so.
        Raises: ``UnsupportedModel`` where ``previews`` is False.
        """
        ...

    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        """Frames [F, 3, H, W] in [0, 1], float32 on the CPU; ``frames``: which, None for all.

        Cost: one decode.
        """
        ...

    def encode(self, clip: Tensor) -> Prefix:
        """A clip [F, 3, H, W] in [0, 1] as a prefix to go on from.

        Raises: ValueError for a clip of another size, or one that does not end where a chunk ends;
        ``UnsupportedModel`` where the pipeline cannot start from pixels.
        """
        ...
