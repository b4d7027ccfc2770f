"""Train the autoencoder of ``emoji-dit``: ``python -m diffalign.embedded.workshop.train_code --out
FOLDER [--from FOLDER] [--resume] [--export FOLDER]``.

A diffusers ``AutoencoderTiny`` whose latent is laid down (``workshop.codes``). The decoder draws a
scene from its code, with Gaussian noise of up to ``NOISE`` standard deviations, so that near-miss
codes become clean pictures; the encoder reads the code from the picture. Both are trained in one
run and do not touch each other. One process, one thread, products in ``precision()``. Cost:
about .1 s an update.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from diffalign.embedded.workshop import training
from diffalign.embedded.workshop.codes import CHANNELS, codes
from diffalign.embedded.workshop.parts_trainer import PartsTrainer, run
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.train_vae import pixels
from diffalign.embedded.workshop.training import (
    Course,
    FlatAdam,
    step_generator,
    step_seed,
)
from diffalign.embedded.world.editions import ALIGNED, CLOSE
from diffalign.embedded.world.scenes import World

NOISE = 0.15
MIX = {"single": 0.3, "colour": 0.4, "two": 0.1, "two_coloured": 0.15, "three": 0.05}
"""Mostly one object that fills the picture."""


def build(seed: int) -> AutoencoderTiny:
    """The untrained autoencoder in fp32, 128 x 128 x 3 pixels to 32 x 32 x 25; initial weights from
    ``seed`` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            latent_channels=CHANNELS,
            encoder_block_out_channels=(32,) * 3,
            decoder_block_out_channels=(64,) * 3,
            num_encoder_blocks=(0, 1, 3),
            num_decoder_blocks=(8, 2, 1),
            scaling_factor=1.0,
        )


def disturbed(latent: Tensor, generator: torch.Generator) -> Tensor:
    """Codes [B, C, h, w] as a denoiser may leave them: with Gaussian noise of up to ``NOISE``
    deviations."""
    sigma = torch.rand((len(latent), 1, 1, 1), generator=generator)
    return latent + NOISE * sigma * torch.randn(latent.shape, generator=generator)


class CodeTrainer(PartsTrainer):
    """The state of a run; ``options`` are those of ``parser``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.vae = build(options.seed)
        if options.source is not None:
            self.vae.load_state_dict(AutoencoderTiny.from_pretrained(options.source).state_dict())
        parts = {
            name: FlatAdam([part], betas=(0.9, 0.95), decay=0.0, channels_last=True)
            for name, part in (("decoder", self.vae.decoder), ("encoder", self.vae.encoder))
        }
        super().__init__(options, parts, hold=0.5, longest=0.999)
        self.close, self.wide = World(dict(MIX), edition=CLOSE), World(edition=ALIGNED)

    def step(self) -> dict[str, float]:
        """One update of the decoder, and of the encoder at every ``options.every``-th; every fourth
        batch holds whole scenes."""
        seed = step_seed(self.options.seed, 0, self.done)
        whole = self.done % 4 == 3
        world, count = (
            (self.wide, self.options.batch // 4)
            if whole
            else (
                self.close,
                self.options.batch,
            )
        )
        scenes = list(world.scenes(seed, count))
        target = pixels(np.stack([scene.image for scene in scenes]), precision())
        latent = codes(scenes)
        generator = step_generator(self.options.seed, 0, self.done)
        noisy = disturbed(latent, generator)
        output = self.vae.decoder(noisy.to(precision())).float()
        difference = output - target.float()
        mse = difference.square().mean()
        (mse + 0.2 * difference.abs().mean()).backward()
        self.update("decoder")
        values = {"mse": mse.item()}
        if self.done % self.options.every == 0:
            reading = F.mse_loss(self.vae.encoder(target).float(), latent)
            reading.backward()  # type: ignore[no-untyped-call]
            self.update("encoder")
            values["reading"] = reading.item()
        self.done += 1
        return values

    def export(self) -> AutoencoderTiny:
        """The autoencoder with the averaged weights in fp32; ends the training of this object."""
        self.settle()
        return self.vae.eval()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=51, save=500)
    add = result.add_argument
    add("--from", dest="source", type=Path, help="folder of an autoencoder to go on from")
    add("--batch", type=int, default=8, help="pictures of 64 x 64; a quarter as many scenes")
    add("--rate", type=float, default=1.5e-3, help="largest learning rate")
    add("--updates", type=int, default=20_000)
    add("--every", type=int, default=4, help="updates of the decoder for one of the encoder")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    course = Course(
        end=options.updates, samples=options.batch, save=options.save, window=100, early=0
    )
    run(CodeTrainer(options), "emoji-dit-vae", course)


if __name__ == "__main__":
    main()
