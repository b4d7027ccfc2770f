"""AnyFlow-FAR: chunks of latents, each made behind the very latents before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from diffalign.core import Meter, UnsupportedModel
from diffalign.core.types import Keywords, Pipeline
from diffalign.seams.session import active
from diffalign.seams.swap import original_class
from diffalign.search.video.base import PipelineExpander
from diffalign.search.video.expander import Branch, Prefix, Price


class AnyFlowFAR(PipelineExpander):
    """Extends ``AnyFlowFARPipeline`` by its own ``video_latents``.

    A chunk reads the chunks before it through a memory of keys and values. The pipeline fills that
    memory once for each of them, and each time writes all of it again: only the last is run here,
    so a video made chunk after chunk costs what one call costs. Its call for a single chunk asks
    for a memory of negative size; chunks without frames before it avoid that. The model is a flow
    map: a preview is the step from where the chunk is to its end, and ``expand`` goes on from
    before that step, so each preview costs one evaluation.
    ``chunks``: the first so many of ``chunk_partition``, None for all.
    """

    pipelines = ("AnyFlowFARPipeline",)
    exact_prefix = True
    batched = True
    sets = ("video", "video_latents", "use_kv_cache")

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[object] = (),
        meter: Meter | None = None,
        chunks: int | None = None,
        **call: object,
    ) -> None:
        super().__init__(pipe, techniques, meter, **call)
        self.factor = int(pipe.vae_scale_factor_temporal)
        limit = pipe.transformer.config.full_chunk_limit
        if limit > 3:
            raise UnsupportedModel(
                "AnyFlowFARPipeline cannot make the first chunk alone where full_chunk_limit is "
                f"above 3 in its transformer's config; got {limit}."
            )
        self.sizes = _sizes(self.values, self.call, pipe.transformer.config, self.factor)
        if chunks is not None and not 1 <= chunks <= len(self.sizes):
            raise ValueError(f"chunks must be in 1 to {len(self.sizes)}; got {chunks}.")
        self.sizes = self.sizes[:chunks]

    @property
    def partition(self) -> tuple[int, ...]:
        first, *others = self.sizes
        return (self.factor * (first - 1) + 1, *(self.factor * size for size in others))

    @property
    def previews(self) -> bool:
        return True

    @property
    def resumes(self) -> bool:
        """Whether a chunk goes on from a preview: no technique has anything to remember."""
        return not (self.techniques or active(self.pipe))

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        rows = self.rows
        context = 1 + (rows > 1 or self.values["guidance_scale"] > 1)
        first = first if self.resumes else 0
        steps = len(range(self.count)[first:last])
        memory = context * (chunk > 0)
        return Price(steps * rows + memory, float(steps * rows + memory * chunk))

    def piece_shape(self, chunk: int) -> tuple[int | None, ...]:
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        height, width = (self.values[name] // scale for name in ("height", "width"))
        return config.in_channels, self.sizes[chunk], height, width

    def noise(self, chunk: int, seed: int) -> Tensor:
        shape = [size for size in self.piece_shape(chunk) if size is not None]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def make(self, branches: Sequence[Branch]) -> list[Tensor]:
        step = branches[0].step
        output = self._run(branches, _schedule(self.values, self.count, step, None) if step else {})
        return [row.clone() for row in output[:, :, -self.sizes[branches[0].chunk] :].cpu()]

    def look(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        first, states = branches[0].step, []

        def note(pipe: Pipeline, index: int, time: object, values: Keywords) -> Keywords:
            states.append(values["latents"])
            return {}

        options = _schedule(self.values, self.count, first, step) | {"callback_on_step_end": note}
        with self.beginning():
            output = self._run(branches, options)
        chunk = branches[0].chunk
        frames = self._frames(output)[:, sum(self.partition[:chunk]) :]
        after = list(branches)
        if self.resumes and len(states) > 1:
            # the last step went to the end of the chunk; the one before it is on the way
            latents = states[-2].permute(0, 2, 1, 3, 4).cpu()
            after = [
                Branch(b.prefix, b.seed, b.number, step - 1, latents[i].clone())
                for i, b in enumerate(branches)
            ]
        return list(zip(after, frames.unbind(0), strict=True))

    def _run(self, branches: Sequence[Branch], options: Keywords) -> Tensor:
        """Latents [B, C, T, h, w] of the prefixes with the chunk behind them."""
        chunk = branches[0].chunk
        noise = torch.stack(
            [self.noise(chunk, b.seed) if b.latents is None else b.latents for b in branches]
        )
        prefixes = [_joined(branch.prefix, like) for branch, like in zip(branches, noise)]
        # a first chunk stands behind one without frames, see above
        sizes = [*([0] if chunk == 0 else []), *self.sizes[: chunk + 1]]
        arguments = self._arguments(sizes, torch.stack(prefixes), noise)
        with self.running(), _last_memory(self.pipe, len(sizes) - 2):
            output: Tensor = self.pipe(**arguments | options)[0]
        return output

    def _arguments(self, sizes: Sequence[int], prefix: Tensor, noise: Tensor) -> Keywords:
        """Of a call that keeps ``prefix`` [B, C, T, h, w] and makes ``noise`` a chunk behind it."""
        return self.call_of(len(prefix)) | {
            "num_frames": self.factor * (sum(sizes) - 1) + 1,
            "chunk_partition": list(sizes),
            "video_latents": prefix.permute(0, 2, 1, 3, 4).to(self.pipe._execution_device),
            "latents": torch.cat([torch.zeros_like(prefix), noise], 2),
            "output_type": "latent",
            "return_dict": False,
        }

    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        video = self._frames(torch.cat(prefix.pieces, 1)[None])[0]
        return video if frames is None else video[list(frames)]

    def _frames(self, latents: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] of latents [B, C, T, h, w]: a call in which all chunks are given,
        so that it does nothing but decode."""
        self.meter.charge(decodes=len(latents))
        arguments = self._arguments([latents.shape[2]], latents, latents[:, :, :0])
        arguments |= {"output_type": "pt", "use_kv_cache": False}
        with self._texts.remembered(self.pipe):
            video: Tensor = original_class(self.pipe).__call__(self.pipe, **arguments)[0]
        return video.detach().to("cpu", torch.float32)

    def encode(self, clip: Tensor) -> Prefix:
        clip = self.check_clip(clip)
        sizes = self.sizes[: _chunks_of(len(clip), list(accumulate(self.partition)))]
        height, width = clip.shape[2:]
        with torch.no_grad():
            latents: Tensor = self.pipe.encode_video(clip[None], height=height, width=width)
        latents = latents[0].permute(1, 0, 2, 3).to("cpu", self.pipe.transformer.dtype)
        ends = [0, *accumulate(sizes)]
        pieces = tuple(latents[:, i:j].clone() for i, j in pairwise(ends))
        return Prefix(pieces, (0,) * len(sizes), (None,) * len(sizes))


def _chunks_of(frames: int, ends: list[int]) -> int:
    """How many chunks a clip of so many frames has, where chunks end after ``ends`` frames.

    Raises: ValueError where it ends within a chunk, or with the last one.
    """
    if frames not in ends:
        raise ValueError(
            f"The clip has {frames} frames and no chunk ends there; chunks end after {ends} "
            "frames. Cut the clip, or give another chunk_partition=..."
        )
    if frames == ends[-1]:
        raise ValueError(
            f"The clip has {frames} frames, which is the whole video; give a larger "
            "num_frames=..., or a chunk_partition=... with more chunks."
        )
    return ends.index(frames) + 1


def _sizes(
    values: Keywords, call: Mapping[str, object], config: Keywords, factor: int
) -> list[int]:
    """Latent frames of each chunk, as the call asks for them.

    Raises: ValueError where its number of frames does not end where a chunk ends.
    """
    sizes = [int(n) for n in values.get("chunk_partition") or config["chunk_partition"]]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"chunk_partition must hold positive numbers; got {sizes}.")
    if call.get("num_frames") is None:
        return sizes
    ends = [factor * (end - 1) + 1 for end in accumulate(sizes)]
    ends = ends if call.get("chunk_partition") is None else ends[-1:]
    frames: int = values["num_frames"]
    if frames not in ends:
        raise ValueError(
            f"num_frames={frames} does not end where a chunk of {sizes} latent frames ends; use "
            f"one of {ends}, or another chunk_partition."
        )
    return sizes if frames == ends[-1] else sizes[: ends.index(frames) + 1]


def _schedule(values: Keywords, count: int, first: int, last: int | None) -> Keywords:
    """Arguments for evaluations ``first`` to ``last`` of a chunk of ``count``, before the shift."""
    for name in ("sigmas", "timesteps"):
        if values.get(name) is not None:
            return {name: list(values[name])[first:last]}
    levels = torch.linspace(1.0, 0.0, count + 1, dtype=torch.float64)[:-1]
    return {"sigmas": levels.tolist()[first:last]}


def _joined(prefix: Prefix | None, like: Tensor) -> Tensor:
    """Latents [C, T, h, w] of a prefix, without frames where there is none."""
    return like[:, :0] if prefix is None else torch.cat(prefix.pieces, 1)


@contextmanager
def _last_memory(pipe: Pipeline, last: int) -> Iterator[None]:
    """Within the block the pipeline fills its memory for chunk ``last`` only, and not at all for
    one without frames. Each time it would write all of it anew."""
    encode, before = pipe.encode_kv_cache, pipe.__dict__.get("encode_kv_cache")

    @functools.wraps(encode)
    def fill(memory: object, flags: Keywords, **options: object) -> object:
        sizes, index = options["chunk_partition"], options["chunk_idx"]
        assert isinstance(sizes, list)
        if index == last and sum(sizes):
            return encode(memory, flags, **options)
        flags["num_cached_chunks"] += 1
        return memory

    pipe.__dict__["encode_kv_cache"] = fill
    try:
        yield
    finally:
        if before is None:
            del pipe.__dict__["encode_kv_cache"]
        else:
            pipe.__dict__["encode_kv_cache"] = before
