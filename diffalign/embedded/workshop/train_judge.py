"""Train a judge: ``python -m diffalign.embedded.workshop.train_judge --model emoji-judge --out
FOLDER --vae FOLDER [--resume] [--export FOLDER]``.

Scenes are rendered on the fly, damaged as in ``degrade``, and in the second phase half of them also
pass a noisy round trip through the autoencoder of ``emoji``, because that is what generated
pictures are made of. The first phase needs no autoencoder. One process, one thread, products in
``precision()``. Cost: about 200 scenes a second of processor time in the first phase, half of that
in the second.

``--edition second --from FOLDER`` goes on from the weights of a judge with the 128 x 128 scenes of
the second edition, at a quarter of that speed. Its second phase sees what the decoder of
``emoji-dit`` draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Json
from diffalign.embedded.nets.audit import STEP, AuditNet, audit_loss
from diffalign.embedded.nets.judge import JudgeNet
from diffalign.embedded.workshop import training
from diffalign.embedded.workshop.codes import codes, pictures
from diffalign.embedded.workshop.degrade import blurred, corrupt, moved, noisy, round_trip
from diffalign.embedded.workshop.judge_loss import judge_loss
from diffalign.embedded.workshop.precision import autocast, precision
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    ModulesTrainer,
    cosine,
    saved_state,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.world.editions import ALIGNED, EDITIONS, FIRST, Edition
from diffalign.embedded.world.scenes import World

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

MIX = {
    "three": 0.2,
    "two_coloured": 0.2,
    "two": 0.1,
    "colour": 0.12,
    "single": 0.08,
    "count": 0.15,
    "position": 0.05,
    "count_coloured": 0.1,
}
"""Scenes of training: many objects a picture, and every kind of question that a verdict asks."""
ANSWERS: dict[str, Json] = {"emoji-judge-audit": {"answers": {"overlap": 0.1, "mean": True}}}
"""Further options of judges of the second edition, where sizes differ and no objects overlap."""
SPREAD = 0.4
"""Largest latent noise of a round trip, in standard deviations of the latent."""
KINDS: dict[str, tuple[type[nn.Module], Any, Json, float]] = {
    "emoji-judge": (JudgeNet, judge_loss, {}, 2.5e-3),
    "emoji-judge-audit": (AuditNet, audit_loss, {}, 1.5e-3),
}
"""Model -> network, loss(output, truth) and peak learning rate."""


def shape(model: str, edition: Edition) -> Json:
    """The options of the network that depend on the size of the images."""
    kind = KINDS[model]
    fixed = kind[0] is AuditNet and edition is not FIRST
    return kind[2] | {"side": edition.side} if fixed else dict(kind[2])


def build(model: str, seed: int, edition: Edition = FIRST, source: Path | None = None) -> nn.Module:
    """The network in fp32, with initial weights from ``seed`` or those of a judge's folder
    ``source``, whose places are stretched over a larger image."""
    network: Any = KINDS[model][0]
    net: nn.Module = network(seed=seed, **shape(model, edition)).to(
        memory_format=torch.channels_last
    )
    if source is not None:
        weights = load_file(source / "model.safetensors")
        if "place" in weights:
            weights["place"] = stretched(weights["place"].float(), edition.side // STEP)
        net.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
    return net


def stretched(place: Tensor, side: int) -> Tensor:
    """Places [1, n * n, C] of a square as [1, side * side, C], interpolated."""
    old = round(place.shape[1] ** 0.5)
    table = place.transpose(1, 2).reshape(place.shape[0], -1, old, old)
    larger = F.interpolate(table, size=(side, side), mode="bilinear", align_corners=False)
    return larger.flatten(2).transpose(1, 2)


class JudgeTrainer(ModulesTrainer):
    """The state of a run.

    ``options`` needs model, seed, batch, updates, vae_updates, edition, source (folder of the first
    weights or None) and rate (a factor of the network's own); ``vae`` is used by the second
    phase only.
    """

    clip, part = 5.0, "net"

    def __init__(self, options: argparse.Namespace, vae: AutoencoderTiny | None = None) -> None:
        self.options, self.vae = options, vae
        edition = EDITIONS[options.edition]
        self.net = build(options.model, options.seed, edition, options.source).train()
        self.loss, self.peak = KINDS[options.model][1], options.rate * KINDS[options.model][3]
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=self.peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        super().__init__(self.net, optimizer)
        self.world = World(MIX, edition=edition)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Damaged images [B, 3, side, side] and truth float [B, most, 6] (class -1: no object) of
        the next step."""
        seed = self.options.seed
        rng = step_generator(seed, 0, self.done)
        images, _, rows = self.world.arrays(step_seed(seed, 0, self.done), self.options.batch)
        pictures, truth = corrupt(
            torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(rows),
            rng,
            edition=self.world.edition,
        )
        if self.done >= self.options.updates:
            if self.vae is None:
                raise ValueError(
                    "The second phase needs the autoencoder of emoji; pass --vae FOLDER."
                )
            half = len(pictures) // 2
            if self.world.edition is FIRST:
                pictures[:half] = round_trip(self.vae, pictures[:half], rng, SPREAD)
            else:
                pictures[:half], truth[:half] = self.drawn(half, rng)
        pictures, boxes = moved(pictures, truth[..., 2:].float(), rng)
        pictures = noisy(blurred(pictures, rng), rng).clamp(0, 1)
        return pictures.contiguous(memory_format=torch.channels_last), torch.cat(
            [truth[..., :2].float(), boxes], dim=2
        )

    @torch.no_grad()
    def drawn(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Aligned scenes as the decoder of ``emoji-dit`` draws them, from codes with noise of up to
        ``SPREAD``, and their truth."""
        assert self.vae is not None
        world = World(MIX, edition=ALIGNED)
        seed = step_seed(self.options.seed, 1, self.done)
        latents = codes(list(world.scenes(seed, count)))
        images = pictures(self.vae.decoder, latents, rng, SPREAD)
        return images, torch.from_numpy(world.arrays(seed, count)[2])

    def losses(self) -> dict[str, Tensor]:
        """The weighted parts of the loss of the next step."""
        images, truth = self.batch()
        with autocast():
            output = self.net(images)
        parts: dict[str, Tensor] = self.loss(output, truth)
        return parts

    def rate(self) -> float:
        """Learning rate of the next update: one cosine a phase, the second from .6 of the peak."""
        first, second = self.options.updates, self.options.vae_updates
        if self.done < first:
            return cosine(self.done, first, self.peak, warm=100, hold=0.3)
        return cosine(self.done - first, second, 0.6 * self.peak, warm=50, hold=0.2, floor=0.01)


def load_vae(folder: Path) -> AutoencoderTiny:
    """The autoencoder in ``precision()`` for round trips."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=precision())
    return vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def thresholds(model: str) -> dict[str, float]:
    """The chosen thresholds of each judge; how they were chosen is in the model card."""
    return {
        "emoji-judge": {"threshold": 0.4, "counting_threshold": 0.4},
        "emoji-judge-audit": {"threshold": 0.5, "counting_threshold": 0.5},
    }[model]


def export(options: argparse.Namespace) -> None:
    """Write the saved state as fp16 safetensors with config, training record and log to
    ``options.export``."""
    state = saved_state(options.out / STATE)
    options.export.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in state["trainer"]["net"].items()
    }
    save_file(weights, options.export / "model.safetensors")
    edition = EDITIONS[options.edition]
    config = {
        "model": options.model,
        "net": shape(options.model, edition),
        "thresholds": thresholds(options.model),
    }
    if edition is not FIRST:
        config |= {"side": edition.side} | ANSWERS.get(options.model, {})
    (options.export / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(options.out / "log.jsonl", options.export / "log.jsonl")
    record = {
        "seed": options.seed,
        "batch": options.batch,
        "updates": state["trainer"]["done"],
        "seconds": round(state["seconds"]),
    }
    (options.export / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def run(options: argparse.Namespace, vae: AutoencoderTiny | None) -> None:
    """Train until ``updates + vae_updates``."""
    header = {
        key: getattr(options, key) for key in ("model", "seed", "batch", "updates", "vae_updates")
    }
    if options.source is not None:
        header |= {"edition": options.edition, "from": options.source.name, "rate": options.rate}
    end = options.updates + options.vae_updates
    course = Course(end=end, samples=options.batch, save=options.save)
    train(JudgeTrainer(options, vae), options, header, course)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=21, save=200)
    result.add_argument("--model", choices=list(KINDS), default="emoji-judge")
    result.add_argument(
        "--vae", type=Path, help="folder of the autoencoder; needed from the second phase on"
    )
    result.add_argument("--batch", type=int, default=32)
    result.add_argument("--updates", type=int, default=1_600)
    result.add_argument("--edition", choices=list(EDITIONS), default=FIRST.name)
    result.add_argument("--from", dest="source", type=Path, help="folder of a judge to go on from")
    result.add_argument(
        "--rate", type=float, default=1.0, help="factor of the network's largest learning rate"
    )
    result.add_argument("--vae-updates", type=int, default=0, help="updates of the second phase")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    if options.export is not None:
        export(options)
        return
    run(options, load_vae(options.vae) if options.vae is not None else None)


if __name__ == "__main__":
    main()
