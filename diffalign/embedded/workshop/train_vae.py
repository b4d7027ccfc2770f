"""Train the autoencoder of ``emoji``: ``python -m diffalign.embedded.workshop.train_vae --out
FOLDER [--resume]``.

A diffusers ``AutoencoderTiny``, 64 x 64 x 3 pixels to 8 x 8 x 16 latents. The latent has to be easy
for a denoiser, so
- its channels have mean 0 and variance 1 (batch normalisation without affine, folded into the
  encoder's last convolution at the end),
- the decoder always sees it with Gaussian noise of up to ``NOISE`` standard deviations: near-miss
  latents decode to clean pictures,
- weak linear heads read class and colour from every noisy cell, so that both are linear in the
  latent. Second phase: encoder frozen, decoder alone. Cost: about 8 minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.training import (
    Course,
    FlatAdam,
    Team,
    cosine,
    launch,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.world.scenes import CELL, GRID, SIZE, World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

CHANNELS = 16
NOISE = 0.6
BATCH = 8
SYNCHRONISE = 8
MIX = {"three": 0.4, "two_coloured": 0.25, "two": 0.15, "colour": 0.1, "count": 0.1}
"""Scenes of the autoencoder's training: many different objects a picture, a third of them tinted or
more."""
STATE = "vae-state-{rank}.pt"


def build(seed: int, channels: int = CHANNELS) -> AutoencoderTiny:
    """The untrained autoencoder in fp32; initial weights from ``seed`` without touching the global
    generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(48,) * 4,
            num_encoder_blocks=(0, 1, 2, 3),
            num_decoder_blocks=(6, 3, 1, 1),
            scaling_factor=1.0,
        )


def pixels(images: npt.NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """uint8 [B, 64, 64, 3] -> [B, 3, 64, 64] in [-1, 1], channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype).div(127.5).sub(1)


def cell_truth(truth: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Truth [B, 4, 6] of ``World.arrays`` -> class and colour of each latent cell, int64 [B, 8, 8];
    80 and 11 are background."""
    side, reach = SIZE // GRID, CELL // GRID
    classes = torch.full((len(truth), side, side), len(OBJECTS))
    colours = torch.full((len(truth), side, side), len(COLOURS) + 1)
    for i, rows in enumerate(truth):
        for kind, colour, x1, y1, x2, y2 in rows[rows[:, 0] >= 0].tolist():
            left, top = (
                round(((low + high) / 2 - CELL / 2) / GRID) for low, high in ((x1, x2), (y1, y2))
            )
            classes[i, top : top + reach, left : left + reach] = kind
            colours[i, top : top + reach, left : left + reach] = colour
    return classes, colours


@torch.no_grad()
def fold(vae: AutoencoderTiny, norm: nn.BatchNorm2d) -> None:
    """Fold the running statistics of ``norm`` (fp32) into the encoder's last convolution, so
    that its output is standardised."""
    last = vae.encoder.layers[-1]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    last.weight.mul_(scale.view(-1, 1, 1, 1).to(last.weight.dtype))
    last.bias.copy_((last.bias - norm.running_mean) * scale)


class VaeTrainer:
    """The state of one process.

    ``updates`` and ``decoder_updates`` are the lengths of the two phases.
    """

    def __init__(
        self,
        team: Team,
        seed: int,
        updates: int,
        decoder_updates: int,
        heads: float = 0.1,
        channels: int = CHANNELS,
    ) -> None:
        self.team, self.seed, self.updates, self.decoder_updates, self.weight = (
            team,
            seed,
            updates,
            decoder_updates,
            heads,
        )
        self.vae = build(seed, channels)
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.01)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = nn.Conv2d(channels, len(OBJECTS) + len(COLOURS) + 3, 1)
        self.flat = FlatAdam([self.vae, self.heads], betas=(0.9, 0.95), channels_last=True)
        self.tail: FlatAdam | None = None
        self.world = World(dict(MIX))
        self.done = 0

    def step(self) -> dict[str, float]:
        """One update on a fresh batch; returns the losses of this process. The first step of phase
        two freezes the encoder."""
        if self.done >= self.updates and self.tail is None:
            self.settle()
        images, _, truth = self.world.arrays(step_seed(self.seed, self.team.rank, self.done), BATCH)
        generator = step_generator(self.seed, self.team.rank, self.done)
        target = pixels(images, precision())
        second = self.tail is not None
        with torch.set_grad_enabled(not second):
            latent = self.norm(self.vae.encoder(target).float())
        sigma = torch.rand(BATCH, 1, 1, 1, generator=generator) * NOISE
        noisy = latent + sigma * torch.randn(latent.shape, generator=generator)
        output = self.vae.decoder(noisy.to(precision())).float()
        difference = output - target.float()
        reconstruction = difference.square().mean() + 0.2 * difference.abs().mean()
        loss, head = reconstruction, torch.zeros(())
        if not second:
            classes, colours = cell_truth(truth)
            logits = self.heads(noisy.to(precision())).float()
            split = len(OBJECTS) + 1
            head = F.cross_entropy(logits[:, :split], classes) + F.cross_entropy(
                logits[:, split:], colours
            )
            loss = loss + self.weight * head
        loss.backward()
        if second:
            rate = cosine(self.done - self.updates, self.decoder_updates, 1e-3, warm=50, hold=0.5)
        else:
            rate = cosine(self.done, self.updates, 2e-3, warm=100, hold=0.3, floor=0.05)
        active = self.flat if self.tail is None else self.tail
        active.step(rate)
        self.done += 1
        if self.done % SYNCHRONISE == 0 or self.done == self.updates:
            self.team.average(active.master.data)
            active.publish()
        return {
            "reconstruction": reconstruction.item(),
            "mse": difference.square().mean().item(),
            "heads": head.item(),
        }

    @torch.no_grad()
    def settle(self) -> None:
        """End phase one: exact statistics of the latents over 2,048 scenes, then an optimiser of
        the decoder alone.

        The encoder must leave the optimiser: weight decay would shrink it although its gradients
        are zero, and a denoiser may already have been trained on its latents.
        """
        total = torch.zeros(2, self.norm.num_features, dtype=torch.float64)
        for index in range(32):
            images, _, _ = self.world.arrays(step_seed(self.seed, 1_000, index), 64)
            latent = self.vae.encoder(pixels(images, precision())).double()
            total += torch.stack([latent.mean((0, 2, 3)), latent.square().mean((0, 2, 3))]) / 32
        self.norm.running_mean = total[0].float()
        self.norm.running_var = (total[1] - total[0].square()).float()
        self._freeze()

    def _freeze(self) -> None:
        self.norm.eval()
        self.vae.encoder.requires_grad_(False)
        self.tail = FlatAdam([self.vae.decoder], betas=(0.9, 0.95), decay=0.0, channels_last=True)

    def state(self) -> dict[str, object]:
        """Everything a resumed run needs."""
        tail = None if self.tail is None else self.tail.state()
        return {
            "flat": self.flat.state(),
            "tail": tail,
            "norm": self.norm.state_dict(),
            "done": self.done,
        }

    def load(self, state: dict[str, object]) -> None:
        """Inverse of ``state``."""
        self.flat.load(state["flat"])  # type: ignore[arg-type]
        self.norm.load_state_dict(state["norm"])  # type: ignore[arg-type]
        self.done = int(state["done"])  # type: ignore[call-overload]
        if state.get("tail") is not None:
            self._freeze()
            assert self.tail is not None
            self.tail.load(state["tail"])  # type: ignore[arg-type]

    def export(self) -> AutoencoderTiny:
        """The trained autoencoder in fp32 with the statistics folded in; ends the training of this
        object."""
        weights = None if self.tail is None else self.tail.master.data.clone()
        self.flat.write(self.flat.master.data)
        if self.tail is not None and weights is not None:
            self.tail.write(weights)
        fold(self.vae, self.norm)
        return self.vae


def run(team: Team, options: argparse.Namespace) -> None:
    """Train to the end and save the autoencoder in ``options.out``."""
    torch.set_num_threads(1)
    trainer = VaeTrainer(
        team,
        options.seed,
        options.updates,
        options.decoder_updates,
        options.heads,
        options.channels,
    )
    course = Course(
        end=options.updates + options.decoder_updates,
        samples=BATCH * team.size,
        save=1_000,
        window=100,
        early=0,
        state=STATE,
        log="vae-log-{rank}.jsonl",
    )
    header = {"model": "emoji-vae", **{key: str(value) for key, value in vars(options).items()}}
    seconds = train(trainer, options, header, course, team.rank)
    if team.rank == 0:
        trainer.export().save_pretrained(options.out / "vae")
        (options.out / "vae-done.json").write_text(json.dumps({"seconds": round(seconds)}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--updates", type=int, default=3_500)
    parser.add_argument("--decoder-updates", type=int, default=6_000)
    parser.add_argument(
        "--heads", type=float, default=0.1, help="weight of the class and colour heads"
    )
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    parameters = VaeTrainer(Team(), 0, 1, 0, channels=options.channels).flat.master.numel()
    launch(run, options.processes, parameters, (options,))


if __name__ == "__main__":
    main()
