"""Train the denoiser of ``emoji-video``: ``python -m diffalign.embedded.workshop.train_video --out
FOLDER --teacher FOLDER [--resume] [--from FOLDER --done N] [--vae FOLDER --export FOLDER]``.

Flow matching (Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv:2210.02747) chunk
by chunk, each chunk behind clean ones as in FAR (Gu, Mao and Shou, "Long-Context Autoregressive
Video Modeling with Next-Frame Prediction", 2025, arXiv:2503.19325): ``diffusers``'
``AnyFlowFARTransformer3DModel``, one latent a chunk, with its text encoder, from scratch.

- The latents are those of the key pictures, by the autoencoder of ``emoji`` (``--teacher``).
- At first there are pictures alone, first chunks of clips: what an object looks like is the hard
  part, and a picture costs a seventh of a clip. Then an update has both.
- All four chunks of a clip learn in one pass, each at a noise level of its own. Their context has
  Gaussian noise of up to ``BLUR`` deviations, since what the sampler leaves is not clean either.
- Captions leave facts out or get them wrong, and one in ten is empty, so that guidance matters.
- A share ``--top`` of the levels is above ``TOP``, where it is not settled yet what is where: there
  a caption is news.
- From ``--lesson``'s first update to its last an update has ``--pairs`` of ``direction_pairs`` as
  well: without them all directions stay one word.

One process, one thread, products in ``precision()``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, AutoencoderKLWan
from torch import Tensor
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from diffalign.embedded.workshop import direction_pairs, noisy_stories, training, video_parts
from diffalign.embedded.workshop.averaged import AveragedTrainer, weights
from diffalign.embedded.workshop.noisy_captions import CaptionNoise
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.train_flow import noise_levels
from diffalign.embedded.workshop.train_video_vae import key_latents, teacher
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    FlatAdam,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.workshop.video_forward import velocities
from diffalign.embedded.workshop.video_parts import FULL, LENGTH
from diffalign.embedded.world.clips import DEFAULT_MIX, Clip, ClipWorld

EASY: dict[str, float] = {"still": 0.35, "colour": 0.25, "moving": 0.3, "moving_coloured": 0.1}
"""The mixture of kinds at the start of the curriculum: one object."""

BLUR = 0.3
TOP = 0.85
LESSON_TOP = 0.7
"""Share of a lesson's noise levels above ``TOP``."""
SECOND = 4
"""Every so many-th update a lesson's clips go as far as their second key picture, else they are
first pictures: what a word means shows in these two, and the second one is learnt sooner."""


def curriculum(share: float) -> dict[str, float]:
    """Mixture of kinds: from ``EASY`` at a ``share`` of 0 linearly to that of the world at 1 and
    above."""
    share = min(1.0, max(0.0, share))
    return {
        kind: (1 - share) * EASY.get(kind, 0.0) + share * weight
        for kind, weight in DEFAULT_MIX.items()
    }


def take(folder: Path, model: AnyFlowFARTransformer3DModel, text: UMT5EncoderModel) -> None:
    """Give both the weights of a pipeline folder."""
    parts = {
        "transformer": (model, AnyFlowFARTransformer3DModel),
        "text_encoder": (text, UMT5EncoderModel),
    }
    for name, (part, cls) in parts.items():
        part.load_state_dict(cls.from_pretrained(folder / name).float().state_dict())


class VideoTrainer(AveragedTrainer):
    """The state of a run; ``options`` are those of ``parser``."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.batch < 1 or options.pictures < 1:
            raise ValueError(
                "batch, pictures: expected at least 1 of each, got "
                f"{options.batch} and {options.pictures}"
            )
        if options.done and options.source is None:
            raise ValueError(f"done: expected --from beside it, got {options.done} alone")
        self.model = video_parts.transformer(options.seed, options.width, options.layers)
        self.text = video_parts.text_encoder(options.seed + 1).train()
        if options.source is not None:
            take(options.source, self.model, self.text)
        self.tokenizer = video_parts.tokenizer()
        self.teacher = teacher(options.teacher)
        self.captions = CaptionNoise()
        super().__init__(options, FlatAdam([self.model, self.text]))
        self.done = options.done

    def sizes(self) -> tuple[int, int]:
        """Clips and pictures of the next step: at first pictures alone, twice as many."""
        if self.done < self.options.alone:
            return 0, 2 * self.options.pictures
        return self.options.batch, self.options.pictures

    def batch(self, size: int, generator: torch.Generator) -> tuple[list[Clip], Tensor]:
        """The next step's clips, and token ids [B, LENGTH] of their captions."""
        first, last = self.options.curriculum
        world = ClipWorld(curriculum((self.done - first) / max(1, last - first)))
        seed = step_seed(self.options.seed, 0, self.done)
        clips, captions = noisy_stories.told(world, self.captions, seed, size)
        empty = torch.rand(size, generator=generator) < 0.1
        captions = ["" if none else text for text, none in zip(captions, empty, strict=True)]
        ids = self.ids(captions)
        # a word that is not known must say nothing
        hidden = (torch.rand(ids.shape, generator=generator) < 0.02) & (ids > video_parts.END)
        return clips, ids.masked_fill(hidden, video_parts.UNKNOWN)

    def ids(self, captions: list[str]) -> Tensor:
        """Token ids [B, LENGTH] of captions."""
        options = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
        ids: Tensor = self.tokenizer(captions, **options).input_ids
        return ids

    def lesson(self) -> list[Clip]:
        """The next step's pairs of clips: plain sentences and starts at edges at first, later as in
        the world and with events too; none outside ``options.lesson``."""
        first, last = self.options.lesson
        place = (self.done - first) / max(1, last - first)
        if not 0 <= place < 1:
            return []
        seed = step_seed(self.options.seed, 1, self.done)
        late = min(1.0, max(0.0, (place - 0.75) / 0.1))
        return direction_pairs.pairs(seed, self.options.pairs, 1 - 0.4 * late, 0.3 * late, late)

    def levels(
        self, size: int, chunks: int, generator: torch.Generator, top: float | None = None
    ) -> Tensor:
        """Noise levels [B, chunks], each column stratified over the batch; ``top``: share of them
        above ``TOP``, by default that of the options."""
        rest = size - round((self.options.top if top is None else top) * size)
        columns = []
        for _ in range(chunks):
            column = torch.cat(
                [
                    noise_levels(rest, self.options.mean, generator),
                    TOP + (1 - TOP) * torch.rand(size - rest, generator=generator),
                ]
            )
            columns.append(column[torch.randperm(size, generator=generator)])
        return torch.stack(columns, 1)

    def errors(
        self, latents: Tensor, ids: Tensor, generator: torch.Generator, paired: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Squared errors of the predictions for each chunk of latents [B, F, C, 8, 8], and the
        noise levels: both [B, F]. ``paired``: two rows after one another share all noise."""
        twice = 2 if paired else 1
        size, (chunks, *shape) = len(latents) // twice, latents.shape[1:]
        levels = self.levels(size, chunks, generator, LESSON_TOP if paired else None)
        noise = torch.randn((size, chunks, *shape), generator=generator)
        blur = BLUR * torch.rand((size, 1, 1, 1, 1), generator=generator)
        blur = blur * torch.randn((size, chunks - 1, *shape), generator=generator)
        # the pipeline fills the text up to any length: by default 512, or the caller's
        extra = (FULL - LENGTH) * torch.randint(2, (size,), generator=generator)
        levels, noise, blur, extra = (
            part.repeat_interleave(twice, 0) for part in (levels, noise, blur, extra)
        )
        level = levels[..., None, None, None]
        answer = velocities(
            self.model,
            ((1 - level) * latents + level * noise).to(precision()),
            (latents[:, :-1] + blur).to(precision()),
            levels,
            video_parts.features(self.text, ids),
            extra,
        )
        losses = F.mse_loss(answer.float(), noise - latents, reduction="none")
        return losses.mean((2, 3, 4)), levels

    def step(self) -> dict[str, float]:
        """One update; returns the mean loss over chunks, and that of first and of later chunks, and
        of those whose noise level is above ``TOP``."""
        generator = step_generator(self.options.seed, 0, self.done)
        films, pictures = self.sizes()
        clips, ids = self.batch(films + pictures, generator)
        parts = []
        if films:
            latents = key_latents(self.teacher, clips[:films])
            parts.append(self.errors(latents, ids[:films], generator))
        if pictures:
            latents = key_latents(self.teacher, clips[films:], count=1)
            parts.append(self.errors(latents, ids[films:], generator))
        if pairs := self.lesson():
            keys = 1 if self.done % SECOND else 2
            latents = key_latents(self.teacher, pairs, count=keys)
            ids = self.ids([clip.caption for clip in pairs])
            parts.append(self.errors(latents, ids, generator, paired=True))
        total = torch.cat([errors.flatten() for errors, _ in parts])
        torch.autograd.backward(total.mean())
        norm = self.update()
        values = total.detach()
        high = values[torch.cat([levels.flatten() for _, levels in parts]) > TOP]
        first = torch.cat([errors.detach()[:, 0] for errors, _ in parts])
        result = {"loss": float(values.mean()), "norm": norm, "first": float(first.mean())}
        if films:
            result["later"] = float(parts[0][0].detach()[:, 1:].mean())
        if pairs:
            result[f"lesson{keys}"] = float(parts[-1][0].detach()[:, -1].mean())
        if len(high):
            result["top"] = float(high.mean())
        return result


def run(options: argparse.Namespace) -> None:
    """Train until ``options.updates``; a state every ``options.save`` updates."""
    torch.set_num_threads(1)
    trainer = VideoTrainer(options)
    header = {"model": "emoji-video", **{key: str(value) for key, value in vars(options).items()}}
    course = Course(
        end=options.updates, samples=options.pictures, save=options.save, window=50, early=5
    )
    train(trainer, options, header, course, facts=lambda: {"rate": round(trainer.rate(), 7)})


def export(
    options: argparse.Namespace, out: Path | None, *, averaged: bool = True
) -> AnyFlowFARPipeline:
    """The pipeline of the state in ``options.out`` with the autoencoder in ``options.vae`` (without
    one: untrained), in fp32; with ``out`` also written there as fp16 safetensors. ``averaged``
    chooses the averaged weights.

    ``options`` needs out, vae, width and layers, as in training. ValueError without a state.
    """
    vector = weights(options.out / STATE, averaged=averaged)
    model = video_parts.transformer(0, options.width, options.layers)
    text = video_parts.text_encoder(0)
    FlatAdam([model, text]).write(vector)
    vae = (
        video_parts.autoencoder(0)
        if options.vae is None
        else AutoencoderKLWan.from_pretrained(options.vae)
    )
    pipe = video_parts.pipeline(model, vae, text)
    if out is not None:
        video_parts.save(pipe, out)
    return pipe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=71, save=250)
    add = result.add_argument
    add("--teacher", type=Path, required=True, help="folder of the autoencoder of emoji")
    add("--from", dest="source", type=Path, help="pipeline folder whose weights are the first")
    add("--done", type=int, default=0, help="with --from: updates that those weights have seen")
    add("--vae", type=Path, help="with --export: folder of the autoencoder of clips")
    add("--width", type=int, default=160, help="channels of a token")
    add("--layers", type=int, default=6, help="blocks of the transformer")
    add("--batch", type=int, default=4, help="clips of an update")
    add("--pictures", type=int, default=12, help="pictures of an update, beside the clips")
    add("--alone", type=int, default=4_000, help="updates on twice as many pictures without clips")
    add("--rate", type=float, default=1e-3, help="largest learning rate")
    add("--updates", type=int, default=24_000)
    add("--decay-from", type=int, default=16_000, help="update at which the rate begins to fall")
    add(
        "--curriculum",
        type=int,
        nargs=2,
        default=(5_000, 8_000),
        help="first update that is not only about one object, and that of the full mixture",
    )
    add(
        "--lesson",
        type=int,
        nargs=2,
        default=(0, 0),
        help="first update with pairs of clips that differ in a word, and the first without again",
    )
    add("--pairs", type=int, default=6, help="such pairs of an update")
    add("--mean", type=float, default=0.6, help="mean of the noise levels' logit")
    add("--top", type=float, default=0.25, help="share of a batch at the highest noise levels")
    add("--decay", type=float, default=0.9985, help="of the averaged weights, per update")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    if options.export is not None:
        if options.vae is None:
            raise ValueError("vae: expected the folder of an autoencoder for --export, got none")
        export(options, options.export)
        return
    run(options)


if __name__ == "__main__":
    main()
