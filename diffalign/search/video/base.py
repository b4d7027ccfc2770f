"""What all expanders share: branches are checked, made and looked at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from diffalign.core import SessionError, UnsupportedModel
from diffalign.seams.swap import original_class
from diffalign.search.video.call import ChunkCall, checked_clip
from diffalign.search.video.expander import Branch, Prefix, Price

T = TypeVar("T")


class PipelineExpander(ChunkCall, ABC):
    """An expander over an unmodified pipeline; run it in a ``with`` block.

    ``techniques`` act in every chunk, as in ``da.apply``; what they remember begins anew with each.
    ``call``: see ``ChunkCall``.
    """

    # exact names of the pipeline classes
    pipelines: ClassVar[tuple[str, ...]]
    exact_prefix: ClassVar[bool]

    @property
    @abstractmethod
    def partition(self) -> tuple[int, ...]:
        """Frames that each chunk adds to the video."""

    @property
    def previews(self) -> bool:
        """Whether ``preview`` works."""
        return False

    @property
    def first_look(self) -> int:
        """The first evaluation after which it does."""
        return 1

    def noise(self, chunk: int, seed: int) -> Tensor:
        """Start noise [C, T, h, w] of a chunk by its seed."""
        raise UnsupportedModel(
            f"{original_class(self.pipe).__name__} draws the noise of each chunk itself, so start "
            "noise cannot be chosen for it. Search with LinearSearch or TreeOfFrames."
        )

    @abstractmethod
    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        """What evaluations of one chunk of one video cost at most."""

    @abstractmethod
    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        """Frames [F, 3, H, W] in [0, 1], float32 on the CPU."""

    @abstractmethod
    def encode(self, clip: Tensor) -> Prefix:
        """A clip [F, 3, H, W] in [0, 1] as a prefix to go on from."""

    @abstractmethod
    def piece_shape(self, chunk: int) -> tuple[int | None, ...]:
        """Shape of the piece of a chunk, None where any length will do."""

    @abstractmethod
    def make(self, branches: Sequence[Branch]) -> list[Tensor]:
        """The piece of each branch, in one call where ``batched``; the branches are checked."""

    def look(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """``preview`` for checked branches, in one call where ``batched``."""
        pipeline, scheduler = original_class(self.pipe), original_class(self.pipe.scheduler)
        raise UnsupportedModel(
            f"{pipeline.__name__} with {scheduler.__name__} does not show what its steps predict, "
            "so chunks cannot be previewed; leave early pruning out."
        )

    def expand(self, branches: Sequence[Branch]) -> list[Prefix]:
        """The prefixes with one more chunk, in the order of ``branches``."""
        self.check(branches)
        pieces = self._by_call(branches, self.make)
        self.meter.note(evaluations=len(branches) * (self.count - branches[0].step))
        return [child(branch, piece) for branch, piece in zip(branches, pieces, strict=True)]

    def preview(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """The branches after evaluation ``step`` of the chunk, each with the frames that the model
        then predicts for it."""
        self.check(branches)
        first = branches[0].step
        if self.previews and not first < step < self.count:
            raise ValueError(
                f"preview(step={step}) must be above {first} and below {self.count}, the number of "
                "evaluations of a chunk."
            )
        pairs = self._by_call(branches, lambda part: self.look(part, step))
        self.meter.note(evaluations=len(branches) * (step - first))
        return pairs

    def check(self, branches: Sequence[Branch]) -> None:
        """Raise for branches that cannot be made together: ValueError, or ``SessionError`` outside
        the expander's block."""
        if not self._is_open:
            raise SessionError("The expander is not open; run it in a `with expander:` block.")
        if not branches:
            raise ValueError("An expander needs at least one branch; got none.")
        places = {(branch.chunk, branch.step) for branch in branches}
        if len(places) > 1:
            raise ValueError(
                "Branches of one call must be at one chunk and step; got (chunk, step) "
                f"{sorted(places)}."
            )
        chunk = branches[0].chunk
        if chunk >= len(self.partition):
            raise ValueError(
                f"The video has {len(self.partition)} chunks and the prefix has them all; give "
                "chunks=... or a larger num_frames to go on."
            )
        for branch in branches:
            self._check_prefix(branch.prefix)

    def _check_prefix(self, prefix: Prefix | None) -> None:
        for chunk, piece in enumerate(() if prefix is None else prefix.pieces):
            shape = self.piece_shape(chunk)
            alike = len(shape) == piece.ndim and all(
                size in (None, length) for size, length in zip(shape, piece.shape)
            )
            if not alike:
                raise ValueError(
                    f"Chunk {chunk} of the prefix is {list(piece.shape)} and must be "
                    f"{['any' if n is None else n for n in shape]} here: go on with an expander of "
                    "the same size and chunks, or encode(clip)."
                )

    def _by_call(
        self, branches: Sequence[Branch], run: Callable[[Sequence[Branch]], list[T]]
    ) -> list[T]:
        size = len(branches) if self.batched else 1
        parts = [branches[i : i + size] for i in range(0, len(branches), size)]
        return [item for part in parts for item in run(part)]

    def check_clip(self, clip: Tensor) -> Tensor:
        """A clip as float32 on the CPU. Raises: ValueError for another shape, size or range."""
        return checked_clip(clip, self.values.get("height"), self.values.get("width"))


def child(branch: Branch, piece: Tensor) -> Prefix:
    """The prefix that a branch becomes with its chunk."""
    before = branch.prefix or Prefix((), (), ())
    return Prefix(
        (*before.pieces, piece), (*before.path, branch.number), (*before.seeds, branch.seed)
    )


def generators_of(branches: Sequence[Branch]) -> list[torch.Generator]:
    """A generator on the CPU for each branch, from its seed."""
    return [torch.Generator().manual_seed(branch.seed) for branch in branches]
