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

``--edition close --from FOLDER`` goes on from the weights of an autoencoder with objects of the
sizes and on the backgrounds of the second edition. There a third head reads from each cell of an
object where in the object it lies, and how large that is.
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
from diffalign.embedded.world.editions import EDITIONS, FIRST, Edition
from diffalign.embedded.world.scenes import CELL, GRID, SIZE, World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

CHANNELS = 16
NOISE = 0.6
BATCH = 8
SYNCHRONISE = 8
MIX = {"three": 0.4, "two_coloured": 0.25, "two": 0.15, "colour": 0.1, "count": 0.1}
"""Scenes of the autoencoder's training: many different objects a picture, a third of them tinted or
more."""
CLOSE_MIX = {"single": 0.3, "colour": 0.4, "two": 0.1, "two_coloured": 0.15, "three": 0.05}
"""The same with editions of several sizes: mostly one object that fills the picture."""
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
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1], channels last."""
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


def covered_truth(
    truth: npt.NDArray[np.int64], side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Truth [B, N, 6] of scenes of ``side`` pixels with objects of any size at any place -> class
    and colour of each latent cell, int64 [B, n, n] with n = side / 8, and its geometry, float [B,
    3, n, n].

    A cell belongs to the object whose box covers at least half of it, to the background (80 and 11)
    where no box touches it, and to nobody (-100, which cross-entropy passes over) in between. The
    geometry is NaN but on objects: the offset of the cell from the centre of its object, across and
    down, in units of half the longer side of the box, and that side in units of 32 pixels.
    """
    ticks = np.arange(0, side, GRID)
    shape = (len(truth), len(ticks), len(ticks))
    classes = torch.full(shape, len(OBJECTS))
    colours = torch.full(shape, len(COLOURS) + 1)
    geometry = torch.full((shape[0], 3, *shape[1:]), torch.nan)
    for i, rows in enumerate(truth):
        for kind, colour, *box in rows[rows[:, 0] >= 0].tolist():
            sides = [(box[0], box[2]), (box[1], box[3])]
            longer = max(high - low for low, high in sides)
            across, down = (
                np.clip(np.minimum(high, ticks + GRID) - np.maximum(low, ticks), 0, GRID) / GRID
                for low, high in sides
            )
            share = torch.from_numpy(down[:, None] * across[None, :])
            inside = share >= 0.5
            for table, value in ((classes, kind), (colours, colour)):
                table[i][share > 0] = -100
                table[i][inside] = value
            x, y = (
                torch.from_numpy((ticks + GRID / 2 - (low + high) / 2) / (longer / 2)).float()
                for low, high in sides
            )
            values = torch.stack(
                [x.expand(shape[1:]), y[:, None].expand(shape[1:]), x.new_full(shape[1:], longer / 32)]
            )
            geometry[i] = torch.where(inside, values, geometry[i])
    return classes, colours, geometry


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

    ``updates`` and ``decoder_updates`` are the lengths of the two phases. The ``source`` is the
    folder of an autoencoder whose weights are the first.
    """

    def __init__(
        self,
        team: Team,
        seed: int,
        updates: int,
        decoder_updates: int,
        heads: float = 0.1,
        channels: int = CHANNELS,
        *,
        edition: Edition = FIRST,
        source: Path | None = None,
        batch: int = BATCH,
        peak: float = 2e-3,
    ) -> None:
        self.team, self.seed, self.updates, self.decoder_updates, self.weight = (
            team,
            seed,
            updates,
            decoder_updates,
            heads,
        )
        self.batch, self.peak = batch, peak
        self.vae = build(seed, channels)
        if source is not None:
            self.vae.load_state_dict(AutoencoderTiny.from_pretrained(source).state_dict())
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.01)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            more = 0 if edition is FIRST else 3
            self.heads = nn.Conv2d(channels, len(OBJECTS) + len(COLOURS) + 3 + more, 1)
        self.flat = FlatAdam([self.vae, self.heads], betas=(0.9, 0.95), channels_last=True)
        self.tail: FlatAdam | None = None
        self.world = World(dict(MIX if edition is FIRST else CLOSE_MIX), edition=edition)
        self.done = 0

    def step(self) -> dict[str, float]:
        """One update on a fresh batch; returns the losses of this process. The first step of phase
        two freezes the encoder."""
        if self.done >= self.updates and self.tail is None:
            self.settle()
        seed = step_seed(self.seed, self.team.rank, self.done)
        images, _, truth = self.world.arrays(seed, self.batch)
        generator = step_generator(self.seed, self.team.rank, self.done)
        target = pixels(images, torch.bfloat16)
        second = self.tail is not None
        with torch.set_grad_enabled(not second):
            latent = self.norm(self.vae.encoder(target).float())
        sigma = torch.rand(self.batch, 1, 1, 1, generator=generator) * NOISE
        noisy = latent + sigma * torch.randn(latent.shape, generator=generator)
        output = self.vae.decoder(noisy.to(torch.bfloat16)).float()
        difference = output - target.float()
        reconstruction = difference.square().mean() + 0.2 * difference.abs().mean()
        loss, head = reconstruction, torch.zeros(())
        if not second:
            head = self.reading(self.heads(noisy.to(torch.bfloat16)).float(), truth)
            loss = loss + self.weight * head
        loss.backward()
        if second:
            place, length = self.done - self.updates, self.decoder_updates
            rate = cosine(place, length, self.peak / 2, warm=50, hold=0.5)
        else:
            rate = cosine(self.done, self.updates, self.peak, warm=100, hold=0.3, floor=0.05)
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

    def reading(self, answers: Tensor, truth: npt.NDArray[np.int64]) -> Tensor:
        """The loss of the heads' answers [B, heads, n, n]."""
        parts = (len(OBJECTS) + 1, len(COLOURS) + 2)
        if self.world.edition is FIRST:
            classes, colours = cell_truth(truth)
            kinds, tints = answers.split(parts, dim=1)
            return F.cross_entropy(kinds, classes) + F.cross_entropy(tints, colours)
        classes, colours, geometry = covered_truth(truth, self.world.edition.side)
        kinds, tints, places = answers.split((*parts, 3), dim=1)
        known = ~geometry.isnan()
        inside, outside = known[:, 0], classes == len(OBJECTS)
        total = F.mse_loss(places[known], geometry[known])
        for answer, table in ((kinds, classes), (tints, colours)):
            losses = F.cross_entropy(answer, table, reduction="none")
            total = total + losses[inside].mean() + losses[outside].mean() / 4
        return total

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
            latent = self.vae.encoder(pixels(images, torch.bfloat16)).double()
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
        edition=EDITIONS[options.edition],
        source=options.source,
        batch=options.batch,
        peak=options.rate,
    )
    course = Course(
        end=options.updates + options.decoder_updates,
        samples=options.batch * team.size,
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
    parser.add_argument("--edition", choices=list(EDITIONS), default=FIRST.name)
    parser.add_argument(
        "--from", dest="source", type=Path, help="folder of an autoencoder to go on from"
    )
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    parameters = VaeTrainer(Team(), 0, 1, 0, channels=options.channels).flat.master.numel()
    launch(run, options.processes, parameters, (options,))


if __name__ == "__main__":
    main()
