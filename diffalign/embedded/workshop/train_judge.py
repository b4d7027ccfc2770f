"""Train a judge: ``python -m diffalign.embedded.workshop.train_judge --model emoji-judge --out
FOLDER --vae FOLDER [--resume] [--export FOLDER]``.

Scenes are rendered on the fly, damaged as in ``degrade``, and in the second phase half of them also
pass a noisy round trip through the autoencoder of ``emoji``, because that is what generated
pictures are made of. The first phase needs no autoencoder. One process, one thread, bf16 arithmetic
over fp32 weights. Cost: about 200 scenes a second of processor time in the first phase, half of
that in the second.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.core.types import Json
from diffalign.embedded.nets.audit import AuditNet, audit_loss
from diffalign.embedded.nets.judge import JudgeNet
from diffalign.embedded.workshop import training
from diffalign.embedded.workshop.degrade import blurred, corrupt, moved, noisy, round_trip
from diffalign.embedded.workshop.judge_loss import judge_loss
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    ModulesTrainer,
    cosine,
    load_state,
    step_generator,
    step_seed,
    train,
)
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
SPREAD = 0.4
"""Largest latent noise of a round trip, in standard deviations of the latent."""
KINDS: dict[str, tuple[type[nn.Module], Any, Json, float]] = {
    "emoji-judge": (JudgeNet, judge_loss, {}, 2.5e-3),
    "emoji-judge-audit": (AuditNet, audit_loss, {}, 1.5e-3),
}
"""Model -> network, loss(output, truth) and peak learning rate."""


def build(model: str, seed: int) -> nn.Module:
    """The untrained network in fp32, initial weights from ``seed``."""
    network: Any = KINDS[model][0]
    net: nn.Module = network(seed=seed).to(memory_format=torch.channels_last)
    return net


class JudgeTrainer(ModulesTrainer):
    """The state of a run.

    ``options`` needs model, seed, batch, updates and vae_updates; ``vae`` (bf16) is used by the
    second phase only.
    """

    clip, part = 5.0, "net"

    def __init__(self, options: argparse.Namespace, vae: AutoencoderTiny | None = None) -> None:
        self.options, self.vae = options, vae
        self.net = build(options.model, options.seed).train()
        self.loss, self.peak = KINDS[options.model][1], KINDS[options.model][3]
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=self.peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        super().__init__(self.net, optimizer)
        self.world = World(MIX)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Damaged images [B, 3, 64, 64] and truth float [B, 4, 6] (class -1: no object) of the next
        step."""
        seed = self.options.seed
        rng = step_generator(seed, 0, self.done)
        images, _, rows = self.world.arrays(step_seed(seed, 0, self.done), self.options.batch)
        pictures, truth = corrupt(
            torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(rows), rng
        )
        if self.done >= self.options.updates:
            if self.vae is None:
                raise ValueError(
                    "The second phase needs the autoencoder of emoji; pass --vae FOLDER."
                )
            half = len(pictures) // 2
            pictures[:half] = round_trip(self.vae, pictures[:half], rng, SPREAD)
        pictures, boxes = moved(pictures, truth[..., 2:].float(), rng)
        pictures = noisy(blurred(pictures, rng), rng).clamp(0, 1)
        return pictures.contiguous(memory_format=torch.channels_last), torch.cat(
            [truth[..., :2].float(), boxes], dim=2
        )

    def losses(self) -> dict[str, Tensor]:
        """The weighted parts of the loss of the next step."""
        images, truth = self.batch()
        with torch.autocast("cpu", torch.bfloat16):
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
    """The autoencoder in bf16 for round trips."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.bfloat16)
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
    state = load_state(options.out / STATE)
    if state is None:
        raise ValueError(f"--out must hold a training state; {options.out} has none. Train first.")
    options.export.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in state["trainer"]["net"].items()
    }
    save_file(weights, options.export / "model.safetensors")
    config = {
        "model": options.model,
        "net": KINDS[options.model][2],
        "thresholds": thresholds(options.model),
    }
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
