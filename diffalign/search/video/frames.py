"""Pipelines that go on from frames: what a chunk is there, and what all of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.core import Meter
from diffalign.core.types import Keywords, Pipeline
from diffalign.search.video.base import PipelineExpander, generators_of
from diffalign.search.video.expander import Branch, Prefix, Price
from diffalign.search.video.look_ahead import LookAhead, first_read, reads

# chunks where the user does not say how many
USUAL = 4


class FrameExpander(PipelineExpander):
    """Base of expanders whose pipeline reads the last frames of the prefix and makes a clip of
    ``num_frames`` that begins with them.

    The frames that were read stay as they were in the prefix. ``chunks``: how many clips.
    ``overlap``: how many frames the pipeline reads.
    Cost: a chunk costs what a clip of ``num_frames`` costs, its overlap included. The pipeline
    decodes what it makes; a decode is counted when the frames are looked at.
    """

    exact_prefix = False
    # number of frames that a call reads where the user does not say, None for a quarter of the clip
    reads: ClassVar[int | None] = None

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[object] = (),
        meter: Meter | None = None,
        chunks: int | None = None,
        overlap: int | None = None,
        **call: object,
    ) -> None:
        super().__init__(pipe, techniques, meter, **call)
        self.chunks = USUAL if chunks is None else chunks
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1; got {chunks}.")
        self.window: int = self.values["num_frames"]
        self._check_length("num_frames", self.window, 1)
        quarter = (self.window // 4 - 1) // self.factor * self.factor + 1
        usual = self.reads if self.reads is not None else max(1, quarter)
        self.overlap = usual if overlap is None else overlap
        self._check_length("overlap", self.overlap, 1)
        if self.reads is not None and self.overlap != self.reads:
            raise ValueError(
                f"{type(self).__name__} reads {self.reads} frame of the prefix; got "
                f"overlap={overlap}."
            )
        if self.overlap >= self.window:
            raise ValueError(
                f"overlap must be below num_frames={self.window}, or nothing new is made; got "
                f"{self.overlap}."
            )

    @property
    def factor(self) -> int:
        """Frames of one frame of latents."""
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        return next(int(vars(self.pipe)[name]) for name in names if name in vars(self.pipe))

    def _check_length(self, name: str, frames: int, least: int) -> None:
        factor = self.factor
        if frames < least or (frames - 1) % factor:
            below = max(least, (frames - 1) // factor * factor + 1)
            raise ValueError(
                f"{name} must be {factor} k + 1 for this pipeline; got {frames}. Use {below} or "
                f"{below + factor}."
            )

    @property
    def partition(self) -> tuple[int, ...]:
        return (self.window, *[self.window - self.overlap] * (self.chunks - 1))

    @property
    def previews(self) -> bool:
        return reads(self.pipe.scheduler)

    @property
    def first_look(self) -> int:
        return first_read(self.pipe.scheduler)

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        # a branch begins anew after a preview
        rows = self.rows * len(range(self.count)[:last])
        return Price(rows, rows * self.window / self.partition[min(chunk, 1)])

    def piece_shape(self, chunk: int) -> tuple[int | None, ...]:
        frames = None if chunk == 0 else self.partition[chunk]  # a clip may stand first
        return frames, 3, self.values.get("height"), self.values.get("width")

    @abstractmethod
    def behind(self, tail: Tensor | None) -> Keywords:
        """Arguments of a call that goes on from ``tail`` [overlap, 3, H, W], None for the first
        chunk."""

    def make(self, branches: Sequence[Branch]) -> list[Tensor]:
        return [self._clip(branch, {}) for branch in branches]

    def look(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        if not self.previews:
            return super().look(branches, step)
        options = {"callback_on_step_end": LookAhead(step)}
        self.meter.charge(decodes=len(branches))
        with self.beginning():
            return [(branch, self._clip(branch, options)) for branch in branches]

    def _clip(self, branch: Branch, options: Keywords) -> Tensor:
        """The new frames [T, 3, H, W] of one branch."""
        tail = None if branch.prefix is None else _tail(branch.prefix, self.overlap)
        (generator,) = generators_of([branch])
        arguments = self.call_of(1) | self.behind(tail) | options
        arguments |= {"generator": generator, "output_type": "pt", "return_dict": False}
        with self.running():
            video = self.run(arguments, generator)
        frames = video.detach().to("cpu", torch.float32)
        if len(frames) < self.window:
            raise RuntimeError(
                f"{type(self.pipe).__name__} made {len(frames)} frames where num_frames="
                f"{self.window} was asked for."
            )
        # what stands before the clip is the prefix as it was given, where the pipeline repeats it
        frames = frames[-self.window :]
        return frames.clone() if tail is None else frames[self.overlap :].clone()

    def run(self, arguments: Keywords, generator: torch.Generator) -> Tensor:
        """The frames [F, 3, H, W] that the pipeline returns."""
        video: Tensor = self.pipe(**arguments)[0][0]
        return video

    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        """Frames [F, 3, H, W] in [0, 1]; they were decoded when they were made."""
        self.meter.charge(decodes=1)
        video = torch.cat(prefix.pieces)
        return video if frames is None else video[list(frames)]

    def encode(self, clip: Tensor) -> Prefix:
        """A clip of any length from ``overlap`` frames on; it stands for the first chunk."""
        clip = self.check_clip(clip)
        if len(clip) < self.overlap:
            raise ValueError(
                f"The clip has {len(clip)} frames and the pipeline reads the last {self.overlap}; "
                "give a longer clip or a smaller overlap=..."
            )
        return Prefix((clip,), (0,), (None,))


def _tail(prefix: Prefix, count: int) -> Tensor:
    """The last ``count`` frames of a prefix; an early chunk is joined only where it is needed."""
    parts: list[Tensor] = []
    for piece in reversed(prefix.pieces):
        parts.insert(0, piece[-(count - sum(map(len, parts))) :])
        if sum(map(len, parts)) == count:
            break
    return torch.cat(parts)
