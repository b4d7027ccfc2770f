"""SkyReels-V2 diffusion forcing: known frames stand in the clip at noise level 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffalign.core import Meter
from diffalign.core.types import Keywords, Pipeline
from diffalign.search.video.expander import Price
from diffalign.search.video.frames import FrameExpander


class SkyReelsV2(FrameExpander):
    """Extends ``SkyReelsV2DiffusionForcingVideoToVideoPipeline`` by ``video`` and
    ``overlap_history``; the first chunk is made by the text-to-video pipeline of its parts.

    ``overlap_history`` and ``base_num_frames`` of the call are ``overlap`` and ``num_frames`` here.
    With ``addnoise_condition`` the pipeline draws from torch's global generator; it is seeded for
    the call and put back.
    """

    pipelines = ("SkyReelsV2DiffusionForcingVideoToVideoPipeline",)
    sets = ("video", "overlap_history", "base_num_frames")

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[object] = (),
        meter: Meter | None = None,
        chunks: int | None = None,
        overlap: int | None = None,
        **call: object,
    ) -> None:
        # the pipeline's own default counts a clip that a call extends to
        call = {"num_frames": 97} | call
        super().__init__(pipe, techniques, meter, chunks, overlap, **call)
        for name, frames in (("num_frames", self.window), ("overlap", self.overlap)):
            latents = (frames - 1) // self.factor + 1
            if latents % self.block:
                raise ValueError(
                    f"{name}={frames} makes {latents} frames of latents, and causal_block_size="
                    f"{self.block} does not divide them: the pipeline would drop the others."
                )

    @property
    def block(self) -> int:
        """Latent frames that are denoised together."""
        return int(
            self.values["causal_block_size"] or self.pipe.transformer.config.num_frame_per_block
        )

    @property
    def previews(self) -> bool:
        return False  # each frame of latents has a scheduler of its own inside the call

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        latents, context = ((n - 1) // self.factor + 1 for n in (self.window, self.overlap))
        steps, *_ = self.pipe.generate_timestep_matrix(
            latents,
            torch.zeros(self.count),
            latents,
            self.values["ar_step"],
            context if chunk else 0,
            self.block,
        )
        rows = self.rows * len(steps)
        return Price(rows, rows * self.window / self.partition[min(chunk, 1)])

    def behind(self, tail: Tensor | None) -> Keywords:
        if tail is None:
            return {}
        lengths = {"overlap_history": len(tail), "base_num_frames": self.window}
        return lengths | {"video": tail[None]}

    def run(self, arguments: Keywords, generator: torch.Generator) -> Tensor:
        pipe = self.pipe
        if "video" not in arguments:
            from diffusers import SkyReelsV2DiffusionForcingPipeline

            pipe = SkyReelsV2DiffusionForcingPipeline(**pipe.components)
            pipe.set_progress_bar_config(**getattr(self.pipe, "_progress_bar_config", {}))
            arguments = {"prompt": None} | arguments | {"base_num_frames": self.window}
        noisy = self.values["addnoise_condition"] > 0
        with _seeded(generator.initial_seed() if noisy else None):
            video: Tensor = pipe(**arguments)[0][0]
        return video


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Within the block torch's global generators begin at ``seed``; None: nothing is done."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
