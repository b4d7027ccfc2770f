"""Train the autoencoder of ``emoji-video``: ``python -m diffalign.embedded.workshop.train_video_vae
--out FOLDER --teacher FOLDER [--resume] [--export FOLDER]``.

A diffusers ``AutoencoderKLWan``, 13 x 64 x 64 pixels to 4 x 8 x 8 latents. Its latent is not learnt
here: that of a key picture is what the teacher, the autoencoder of ``emoji``, makes of it. So the
denoiser can be trained before, after or beside this. The decoder draws all 13 pictures from the
four latents, with Gaussian noise of up to ``NOISE`` deviations, and so learns how things go from
one key picture to the next; the encoder reads the latents from the pictures. Both are trained in
one run and do not touch each other. One process, one thread, products in ``precision()``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn import functional as F

from diffalign.embedded.workshop import training, video_parts
from diffalign.embedded.workshop.parts_trainer import PartsTrainer, run
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.train_vae import pixels
from diffalign.embedded.workshop.training import (
    Course,
    FlatAdam,
    step_generator,
    step_seed,
)
from diffalign.embedded.world.clips import EVERY, FRAMES, KEYS, Clip, ClipWorld

NOISE = 0.5
MIX = {"still": 0.05, "colour": 0.15, "moving": 0.2, "moving_coloured": 0.25, "moving_and": 0.15,
       "beside": 0.1, "before": 0.1}  # fmt: skip
"""Mostly motion, much of it coloured."""


def teacher(folder: Path) -> AutoencoderTiny:
    """The autoencoder that lays the latents down, frozen, in ``precision()``."""
    vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=precision())
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def key_latents(vae: AutoencoderTiny, clips: list[Clip], count: int = KEYS) -> Tensor:
    """The latents of the first ``count`` key pictures, float32 [B, count, 16, 8, 8]; a picture that
    repeats the one before is encoded once."""
    pictures = [np.stack([clip.shot(EVERY * k)[0] for k in range(count)]) for clip in clips]
    fresh = np.array(
        [[k == 0 or bool((p[k] != p[k - 1]).any()) for k in range(count)] for p in pictures]
    )
    places = torch.from_numpy(fresh.flatten().cumsum() - 1)
    frames = np.concatenate(pictures)[fresh.flatten()]
    latents: Tensor = vae.encoder(pixels(frames, precision())).float()
    return latents[places].view(len(clips), count, *latents.shape[1:])


def drawing(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """``vae.decode`` of [B, C, T, h, w] without its clamp, which has no gradient for pixels that
    are too dark or too bright."""
    vae.clear_cache()
    x, pieces = vae.post_quant_conv(latents), []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        pieces.append(
            vae.decoder(
                x[:, :, i : i + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=i == 0,
            )
        )
    vae.clear_cache()
    result: Tensor = unpatchify(torch.cat(pieces, 2), vae.config.patch_size)
    return result


class VideoVaeTrainer(PartsTrainer):
    """The state of a run; ``options`` are those of ``parser``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.vae = video_parts.autoencoder(options.seed)
        self.teacher = teacher(options.teacher)
        vae = self.vae
        vae.quant_conv.requires_grad_(False)
        modules = {"decoder": [vae.post_quant_conv, vae.decoder], "encoder": [vae.encoder]}
        parts = {
            name: FlatAdam(part, betas=(0.9, 0.95), decay=0.0) for name, part in modules.items()
        }
        vae.quant_conv.to(precision())
        super().__init__(options, parts, hold=0.4, longest=0.998)
        self.world = ClipWorld(dict(MIX))

    def step(self) -> dict[str, float]:
        """One update of the decoder, and of the encoder at every ``options.every``-th."""
        seed = step_seed(self.options.seed, 0, self.done)
        generator = step_generator(self.options.seed, 0, self.done)
        clips = list(self.world.clips(seed, self.options.batch))
        frames = np.concatenate([clip.pictures() for clip in clips])
        pictures = pixels(frames, precision())
        target = pictures.reshape(len(clips), FRAMES, *pictures.shape[1:]).transpose(1, 2)
        latents = key_latents(self.teacher, clips).transpose(1, 2)
        sigma = NOISE * torch.rand((len(clips), 1, 1, 1, 1), generator=generator)
        noisy = latents + sigma * torch.randn(latents.shape, generator=generator)
        difference = drawing(self.vae, noisy.to(precision())).float() - target.float()
        mse = difference.square().mean()
        torch.autograd.backward(mse + 0.2 * difference.abs().mean())
        self.update("decoder")
        values = {"mse": mse.item()}
        if self.done % self.options.every == 0:
            moments = self.vae._encode(target.contiguous())
            reading = F.mse_loss(moments.chunk(2, 1)[0].float(), latents)
            torch.autograd.backward(reading)
            self.update("encoder")
            values["reading"] = reading.item()
        self.done += 1
        return values

    def export(self) -> AutoencoderKLWan:
        """The autoencoder with the averaged weights in fp32; ends the training of this object."""
        self.settle()
        return self.vae.float().eval()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=61, save=100)
    add = result.add_argument
    add("--teacher", type=Path, required=True, help="folder of the autoencoder of emoji")
    add("--batch", type=int, default=2, help="clips of an update")
    add("--rate", type=float, default=1.5e-3, help="largest learning rate")
    add("--updates", type=int, default=6_000)
    add("--every", type=int, default=4, help="updates of the decoder for one of the encoder")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    course = Course(
        end=options.updates, samples=options.batch, save=options.save, window=50, early=5
    )
    run(VideoVaeTrainer(options), "emoji-video-vae", course)


if __name__ == "__main__":
    main()
