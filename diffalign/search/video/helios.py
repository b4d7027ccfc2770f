"""Helios: chunks of latents, each made behind a short history of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core import Meter
from diffalign.core.types import Keywords, Pipeline
from diffalign.search.video.base import PipelineExpander, generators_of
from diffalign.search.video.expander import Branch, Prefix, Price
from diffalign.search.video.look_ahead import LookAhead, first_read, reads


class Helios(PipelineExpander):
    """Extends ``HeliosPipeline`` by ``video_latents`` and ``image_latents``, without the noise that
    the pipeline adds to both by itself.

    A chunk is ``num_latent_frames_per_chunk`` frames of latents, which are decoded by themselves:
    9 make 33 frames. The pipeline cuts its frames to a number 4 k + 1; here none is cut. It decodes
    each chunk even where latents are asked for; a decode is counted when frames are looked at.
    ``chunks``: None for those of ``num_frames``.
    """

    pipelines = ("HeliosPipeline",)
    exact_prefix = True
    batched = True
    sets = (
        "image",
        "image_latents",
        "fake_image_latents",
        "video",
        "video_latents",
        "is_skip_first_chunk",
    )

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[object] = (),
        meter: Meter | None = None,
        chunks: int | None = None,
        **call: object,
    ) -> None:
        super().__init__(pipe, techniques, meter, **call)
        self.size: int = self.values["num_latent_frames_per_chunk"]
        self.window = (self.size - 1) * int(pipe.vae_scale_factor_temporal) + 1
        self.chunks = -(-self.values["num_frames"] // self.window) if chunks is None else chunks
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1; got {self.chunks}.")

    @property
    def partition(self) -> tuple[int, ...]:
        return (self.window,) * self.chunks

    @property
    def previews(self) -> bool:
        return reads(self.pipe.scheduler)

    @property
    def first_look(self) -> int:
        return first_read(self.pipe.scheduler)

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        rows = self.rows * len(range(self.count)[:last])
        return Price(rows, float(rows))

    def piece_shape(self, chunk: int) -> tuple[int | None, ...]:
        channels, scale = (
            self.pipe.transformer.config.in_channels,
            self.pipe.vae_scale_factor_spatial,
        )
        height, width = (self.values[name] // scale for name in ("height", "width"))
        return channels, self.size, height, width

    def make(self, branches: Sequence[Branch]) -> list[Tensor]:
        return [row.clone() for row in self._run(branches, {}).cpu()]

    def look(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        if not self.previews:
            return super().look(branches, step)
        latents = self._run(branches, {"callback_on_step_end": LookAhead(step)})
        self.meter.charge(decodes=len(branches))
        return list(zip(branches, self._frames(latents), strict=True))

    def _run(self, branches: Sequence[Branch], options: Keywords) -> Tensor:
        """Latents [B, C, T, h, w] of the chunk of each branch."""
        arguments = self.call_of(len(branches)) | {
            "num_frames": self.window,
            "generator": generators_of(branches),
            "output_type": "latent",
            "return_dict": False,
        }
        if branches[0].prefix is not None:
            latents = torch.stack([torch.cat(_pieces(branch), 1) for branch in branches])
            latents = latents.to(self.pipe._execution_device)
            arguments |= {
                "video_latents": latents,
                "image_latents": latents[:, :, :1],
                "add_noise_to_video_latents": False,
                "add_noise_to_image_latents": False,
            }
        with self.running():
            output: Tensor = self.pipe(**arguments | options)[0]
        return output[:, :, -self.size :]

    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        self.meter.charge(decodes=1)
        total = range(self.window * prefix.chunks)
        places = list(total) if frames is None else [total[frame] for frame in frames]
        chunks = sorted({place // self.window for place in places})
        videos = {n: self._frames(prefix.pieces[n][None])[0] for n in chunks}
        return torch.stack([videos[p // self.window][p % self.window] for p in places])

    @torch.no_grad()
    def _frames(self, latents: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] of one chunk's latents, decoded as the pipeline decodes them."""
        vae, place = self.pipe.vae, self.pipe._execution_device
        values = latents.to(place, vae.dtype)
        mean, std = self._normal(place, vae.dtype)
        video = vae.decode(values / (1.0 / std) + mean, return_dict=False)[0]
        frames: Tensor = self.pipe.video_processor.postprocess_video(video, output_type="pt")
        return frames.to("cpu", torch.float32)

    def _normal(self, place: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents [1, C, 1, 1, 1]."""
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(place, dtype)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    @torch.no_grad()
    def encode(self, clip: Tensor) -> Prefix:
        clip = self.check_clip(clip)
        count, rest = divmod(len(clip), self.window)
        if rest or not count:
            raise ValueError(
                f"The clip has {len(clip)} frames and a chunk {self.window}; cut it to a multiple "
                f"of {self.window}."
            )
        if count >= self.chunks:
            raise ValueError(
                f"The clip has {count} chunks, which is the whole video; give chunks={count + 1} "
                "or more."
            )
        vae, place = self.pipe.vae, self.pipe._execution_device
        video = self.pipe.video_processor.preprocess_video(clip[None]).to(place, vae.dtype)
        mean, std = self._normal(place, vae.dtype)
        parts = video.split(self.window, 2)
        latents = [(vae.encode(part).latent_dist.mode() - mean) * (1.0 / std) for part in parts]
        pieces = tuple(part[0].to("cpu", torch.float32) for part in latents)
        return Prefix(pieces, (0,) * count, (None,) * count)


def _pieces(branch: Branch) -> tuple[Tensor, ...]:
    assert branch.prefix is not None
    return branch.prefix.pieces
