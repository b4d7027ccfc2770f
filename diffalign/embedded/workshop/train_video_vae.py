"""Train the autoencoder of ``emoji-video``: ``python -m diffalign.embedded.workshop.train_video_vae
--out FOLDER --teacher FOLDER [--resume] [--export FOLDER] [--from FOLDER --parts encoder]``.

A diffusers ``AutoencoderKLWan``, 13 x 64 x 64 pixels to 4 x 8 x 8 latents. Its latent is not learnt
here: that of a key picture is what the teacher, the autoencoder of ``emoji``, makes of it. So the
denoiser can be trained before, after or beside this. The decoder draws all 13 pictures from the
four latents, with Gaussian noise of up to ``NOISE`` deviations, and so learns how things go from
one key picture to the next; the encoder reads the latents from the pictures. Both are trained in
one run and do not touch each other.

Both begin as ones that look at key pictures alone: the encoder leaves the others out, the decoder
shows each key picture four times. For the first ``--alone`` updates they learn from single
pictures: what a glyph looks like is the hard part, and a picture costs a twentieth of a clip. Then
the encoder is done, since a latent is that of its key picture, and the decoder has only the ways
between key pictures to learn. Most clips end with their second key picture. One process, one
thread, products in ``precision()``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    unpatchify,
)
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
from diffalign.embedded.world.clips import EVERY, KEYS, Clip, ClipWorld
from diffalign.embedded.world.scenes import World

NOISE = 0.5
MIX = {"still": 0.05, "colour": 0.15, "moving": 0.2, "moving_coloured": 0.25, "moving_and": 0.15,
       "beside": 0.1, "before": 0.1}  # fmt: skip
"""Mostly motion, much of it coloured."""
PICTURES = {"three": 0.4, "two_coloured": 0.25, "two": 0.15, "colour": 0.2}
"""Scenes of single pictures."""
PARTS = ("decoder", "encoder")
WHOLE = 4
"""Every so many-th update on clips shows them to their end, the others to the second key picture.
"""


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


@torch.no_grad()
def look_at_key_pictures(vae: AutoencoderKLWan) -> None:
    """Make it one that looks at no earlier picture: convolutions along time are zero but for their
    last slice. The encoder leaves out all but the key pictures; of the decoder, pictures between
    two of them are the second one."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight
            identity = torch.eye(weight.shape[1], dtype=weight.dtype)
            weight[:, :, -1, 0, 0] = identity.repeat(len(weight) // weight.shape[1], 1)
            module.time_conv.bias.zero_()


@contextmanager
def one_picture(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within, first pictures only are read and drawn: convolutions use the last slice of their
    weights, since behind it there would be zeros. The same to rounding, at a third of the cost."""

    def flat(module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        weight = module.weight[:, :, -1]
        padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
        return F.conv2d(x[:, :, 0], weight, module.bias, padding=padding).unsqueeze(2)

    modules = [part for part in vae.modules() if isinstance(part, WanCausalConv3d)]
    for module in modules:
        module.forward = flat.__get__(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class VideoVaeTrainer(PartsTrainer):
    """The state of a run; ``options`` are those of ``parser``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.vae = video_parts.autoencoder(options.seed)
        look_at_key_pictures(self.vae)
        if options.source is not None:
            self._take(AutoencoderKLWan.from_pretrained(options.source), options.parts)
        self.teacher = teacher(options.teacher)
        vae = self.vae
        vae.quant_conv.requires_grad_(False)
        modules = {"decoder": [vae.post_quant_conv, vae.decoder], "encoder": [vae.encoder]}
        parts = {
            name: FlatAdam(part, betas=(0.9, 0.95), decay=0.0) for name, part in modules.items()
        }
        if options.parts == ["encoder"] and options.alone < options.updates:
            raise ValueError(
                "parts: an encoder learns from pictures alone; expected --alone of at least "
                f"--updates, {options.updates}, got {options.alone}"
            )
        vae.quant_conv.to(precision())
        super().__init__(options, parts, hold=0.7, longest=0.998)
        self.world, self.scenes = ClipWorld(dict(MIX)), World(dict(PICTURES))

    def _take(self, vae: AutoencoderKLWan, learning: list[str]) -> None:
        """Give the parts that are not to learn the weights of ``vae``."""
        others = [part for part in PARTS if part not in learning]
        for name in others + ["post_quant_conv"] * ("decoder" in others):
            self.vae.get_submodule(name).load_state_dict(vae.get_submodule(name).state_dict())

    def pictures(self, generator: torch.Generator) -> dict[str, float]:
        """Updates on single pictures; returns the errors."""
        seed = step_seed(self.options.seed, 0, self.done)
        images, _, _ = self.scenes.arrays(seed, self.options.pictures)
        target = pixels(images, precision())
        values = {}
        with torch.no_grad():
            latents = self.teacher.encoder(target).float().unsqueeze(2)
        with one_picture(self.vae):
            if "decoder" in self.options.parts:
                values["mse"] = self.error(latents, target.unsqueeze(2), generator).item()
                self.update("decoder")
            if "encoder" in self.options.parts:
                moments = self.vae._encode(target.unsqueeze(2))
                reading = F.mse_loss(moments.chunk(2, 1)[0].float(), latents)
                torch.autograd.backward(reading)
                self.update("encoder")
                values["reading"] = reading.item()
        return values

    def error(self, latents: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Squared error of what the decoder draws from noisy latents [B, C, T, h, w]; its gradient
        and that of the absolute error are left in the weights."""
        sigma = NOISE * torch.rand((len(latents), 1, 1, 1, 1), generator=generator)
        noisy = latents + sigma * torch.randn(latents.shape, generator=generator)
        difference = drawing(self.vae, noisy.to(precision())).float() - target.float()
        mse = difference.square().mean()
        torch.autograd.backward(mse + 0.2 * difference.abs().mean())
        return mse.detach()

    def step(self) -> dict[str, float]:
        """One update on pictures, or later one of the decoder on clips."""
        generator = step_generator(self.options.seed, 0, self.done)
        if self.done < self.options.alone:
            values = self.pictures(generator)
            self.done += 1
            return values
        whole = self.done % WHOLE == 0
        keys, size = (KEYS, self.options.batch // 2) if whole else (2, self.options.batch)
        seed = step_seed(self.options.seed, 1, self.done)
        clips = list(self.world.clips(seed, max(1, size)))
        count = 1 + EVERY * (keys - 1)
        frames = np.stack([clip.shot(i)[0] for clip in clips for i in range(count)])
        pictures = pixels(frames, precision())
        target = pictures.reshape(len(clips), count, *pictures.shape[1:]).transpose(1, 2)
        latents = key_latents(self.teacher, clips, keys).transpose(1, 2)
        values = {"mse": self.error(latents, target, generator).item()}
        self.update("decoder")
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
    add(
        "--batch", type=int, default=4, help="clips of an update, half of them where they are whole"
    )
    add("--pictures", type=int, default=24, help="pictures of an update without clips")
    add("--alone", type=int, default=4_000, help="updates without clips")
    add("--rate", type=float, default=1.5e-3, help="largest learning rate")
    add("--updates", type=int, default=12_000)
    add(
        "--from", dest="source", type=Path, help="autoencoder that the parts not named are taken of"
    )
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is to learn")
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
