"""Train ``emoji-evaluator``: ``python -m diffalign.embedded.workshop.train_evaluator --out FOLDER
--trajectories FILE [--pipeline FOLDER] [--resume]``.

Pairs of scenes that differ in one fact are rendered, encoded by the autoencoder of ``emoji`` and
noised to one level of its schedule a pair; the true caption has to win against the partner's
caption, a caption of another pair, the partner's latents and a spoilt picture, and readers of
class, colour and corner on every cell keep the trunk honest. From update ``--from`` on, latents on
the sampler's own way (``workshop.trajectories``), right above wrong within their prompt, teach what
a weight that is too small or too large does. Verdicts come from the second judge; the first is
never used, so that it can measure. Text encoder and autoencoder are frozen. One process, one
thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Json, Pipeline
from diffalign.embedded.load import FOLDER
from diffalign.embedded.nets.evaluator import EvaluatorNet, word_mask
from diffalign.embedded.workshop import training
from diffalign.embedded.workshop.clip_loss import ranked
from diffalign.embedded.workshop.degrade import corrupt
from diffalign.embedded.workshop.pairs import FOCUS, MIX, batch
from diffalign.embedded.workshop.precision import autocast, precision
from diffalign.embedded.workshop.samples import Samples
from diffalign.embedded.workshop.train_vae import cell_truth
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
from diffalign.embedded.workshop.trajectories import Trajectories
from diffalign.embedded.world.scenes import CELL, GRID
from diffalign.embedded.world.tokens import encode
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

PEAK = 2e-3
GROUPS = 6
"""Prompts of sampled latents in a step."""


class EvaluatorTrainer(ModulesTrainer):
    """The state of a run of ``pipe``, which is ``emoji``.

    ``options`` needs seed, pairs, spoilt, updates, begin (when ``trajectories`` join).
    """

    plain_attention = True

    def __init__(
        self, options: argparse.Namespace, pipe: Pipeline, trajectories: Trajectories | None = None
    ) -> None:
        self.options, self.trajectories = options, trajectories
        self.vocab: dict[str, int] = pipe.tokenizer.get_vocab()
        self.encoder = pipe.vae.encoder.to(
            precision(), memory_format=torch.channels_last
        ).requires_grad_(False)
        self.text = pipe.text_encoder.eval().requires_grad_(False)
        self.text.set_attn_implementation("eager")
        self.net = EvaluatorNet(
            pipe.vae.config.latent_channels, self.text.config.hidden_size, seed=options.seed
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + 1)
            self.readers = nn.Linear(
                self.net.place.shape[1], len(OBJECTS) + 1 + len(COLOURS) + 2 + 1
            )
        modules = nn.ModuleList([self.net, self.readers]).train()
        weights = [p for p in modules.parameters() if p.ndim > 1]
        others = [p for p in modules.parameters() if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        super().__init__(modules, torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), fused=True))
        cumulative = pipe.scheduler.alphas_cumprod
        self.signal, self.noise = cumulative.sqrt(), (1 - cumulative).sqrt()

    @torch.no_grad()
    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, 24] -> states of the words [B, L, 192] and their mask [B, L], without the
        padding that no prompt needs."""
        mask = word_mask(ids)
        longest = int(mask.sum(1).max())
        with autocast():
            return self.text(ids).last_hidden_state[:, :longest].float(), mask[:, :longest]

    def look(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Cells of latents noised to ``times`` [B]."""
        signal, spread = (table[times].view(-1, 1, 1, 1) for table in (self.signal, self.noise))
        with autocast():
            return self.net.look(
                signal * clean + spread * noise, self.noise[times] / self.signal[times]
            )

    def compare(self, cells: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
        """Logits of cells against the states of words."""
        with autocast():
            return self.net.compare(cells, *words)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [0, 1] -> latents in fp32."""
        pixels = (images * 2 - 1).to(precision()).contiguous(memory_format=torch.channels_last)
        return self.encoder(pixels).float()  # type: ignore[no-any-return]

    def losses(self) -> dict[str, Tensor]:
        """The weighted parts of the loss of the next step."""
        options, rng = self.options, step_generator(self.options.seed, 0, self.done)
        mixture = (MIX, 3) if self.done < options.begin // 2 else (FOCUS, 6)
        arrays, captions, rows, same, _ = batch(
            step_seed(options.seed, 0, self.done), options.pairs, *mixture
        )
        images, truth = (
            torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(rows),
        )
        size, partner = len(images), torch.arange(len(images)) ^ 1
        sources = torch.randperm(size, generator=rng)[: options.spoilt]
        spoilt, _ = corrupt(images[sources], truth[sources], rng, share=1.0)
        clean = self.latents(torch.cat([images, spoilt]))
        # one level and one noise a pair: what tells the two pictures apart is then the picture
        place = (
            torch.arange(options.pairs) + torch.rand(options.pairs, generator=rng)
        ) / options.pairs
        times = (
            (place * len(self.signal)).long().clamp(max=len(self.signal) - 1).repeat_interleave(2)
        )
        noise = torch.randn(options.pairs, *clean.shape[1:], generator=rng).repeat_interleave(
            2, dim=0
        )
        cells = self.look(
            clean, torch.cat([noise, noise[sources]]), torch.cat([times, times[sources]])
        )
        words, mask = self.states(
            torch.tensor([encode(self.vocab, caption) for caption in captions])
        )
        stranger = (torch.arange(size) + 2) % size  # a neighbouring level, another scene
        turns = torch.cat([torch.arange(size), partner, stranger])
        pictures = torch.cat([torch.arange(size).repeat(3), torch.arange(size, len(clean))])
        texts = torch.cat([turns, sources])
        scores = self.compare(cells[pictures], (words[texts], mask[texts]))
        true, other, strange, broken = torch.split(scores, [size, size, size, len(sources)])
        strange = strange[~torch.from_numpy(same)[torch.arange(size), stranger]]
        parts = {
            "caption": F.softplus(other - true).mean(),
            "picture": F.softplus(other[partner] - true).mean(),
            "spoilt": 0.3 * F.softplus(broken - true[sources]).mean(),
            "truth": 0.2
            * (F.softplus(-true).mean() + F.softplus(other).mean() + F.softplus(strange).mean()),
        }
        kind, colour, corner = torch.split(
            self.readers(cells[:size].float()), [len(OBJECTS) + 1, len(COLOURS) + 2, 1], dim=2
        )
        kinds, colours = (table.flatten(1) for table in cell_truth(rows))
        parts["cells"] = 0.5 * F.cross_entropy(kind.transpose(1, 2), kinds) + 0.3 * F.cross_entropy(
            colour.transpose(1, 2), colours
        )
        parts["corners"] = F.binary_cross_entropy_with_logits(corner.squeeze(2), corners(rows))
        if self.done >= options.begin:
            parts["ranking"] = self.ranking()
        return parts

    def ranking(self) -> Tensor:
        """Right above wrong latents of the same prompt and step: mean softplus over all such pairs
        of ``GROUPS`` prompts."""
        if self.trajectories is None:
            raise ValueError(
                "Updates from --from on need sampled latents; pass --trajectories FILE."
            )
        rng, known = step_generator(self.options.seed, 1, self.done), self.trajectories
        mixed = known.mixed()
        turns = mixed[torch.randint(len(mixed), (GROUPS,), generator=rng)]
        at = torch.randint(len(known.sigmas), (GROUPS,), generator=rng)
        latents, sigma = known.latents[turns, :, at].float(), known.sigmas[at]
        count = latents.shape[1]
        words, mask = self.states(
            Samples.ids([known.captions[i] for i in turns.tolist()], self.vocab)
        )
        with autocast():
            cells = self.net.look(latents.flatten(0, 1), sigma.repeat_interleave(count))
        scores = self.compare(
            cells, (words.repeat_interleave(count, 0), mask.repeat_interleave(count, 0))
        ).view(GROUPS, count)
        return ranked(scores, known.right[turns])

    def rate(self) -> float:
        """Learning rate of the next update."""
        return cosine(self.done, self.options.updates, PEAK, warm=100, hold=0.4, floor=0.01)


def corners(truth: Any) -> Tensor:
    """Truth int64 [B, 4, 6] of ``pairs`` -> 1 on the upper left cell of each object, float [B, 64];
    their number is the objects'."""
    marks = torch.zeros(len(truth), 8, 8)
    for index, rows in enumerate(truth):
        for _, _, x1, y1, x2, y2 in rows[rows[:, 0] >= 0].tolist():
            left, top = (
                round(((low + high) / 2 - CELL / 2) / GRID) for low, high in ((x1, x2), (y1, y2))
            )
            marks[index, top, left] = 1.0
    return marks.flatten(1)


def _pipeline(folder: Path) -> Pipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )


def export(options: argparse.Namespace) -> None:
    """Write the saved state to ``options.export`` as fp16 safetensors with its log, and the
    hashes of the parts of ``emoji`` it belongs to."""
    from diffalign.core.identity import model_hash

    state, folder = saved_state(options.out / STATE), options.export
    pipe = _pipeline(options.pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k.removeprefix("0."): v.half().contiguous()
        for k, v in state["trainer"]["modules"].items()
        if k.startswith("0.")
    }
    save_file(weights, folder / "model.safetensors")
    config: Json = {
        "net": {
            "channels": pipe.vae.config.latent_channels,
            "text": pipe.text_encoder.config.hidden_size,
        }
    }
    config |= {part: model_hash(getattr(pipe, part)) for part in ("vae", "text_encoder")}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(options.out / "log.jsonl", folder / "log.jsonl")
    record = {"seed": options.seed, "pairs": options.pairs, "spoilt": options.spoilt}
    record |= {"updates": state["trainer"]["done"], "seconds": round(state["seconds"])}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def run(options: argparse.Namespace, pipe: Pipeline, trajectories: Trajectories | None) -> None:
    """Train to ``options.updates``; a state every ``options.save`` updates."""
    header = {"model": "emoji-evaluator"} | {
        key: getattr(options, key) for key in ("seed", "pairs", "spoilt", "updates", "begin")
    }
    trainer = EvaluatorTrainer(options, pipe, trajectories)
    samples = 2 * options.pairs + options.spoilt
    train(trainer, options, header, Course(options.updates, samples, options.save))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=61, save=100)
    result.add_argument("--pipeline", type=Path, default=FOLDER / "emoji", help="folder of emoji")
    result.add_argument(
        "--trajectories",
        type=Path,
        help="sampled latents with verdicts; needed from update --from on",
    )
    result.add_argument("--pairs", type=int, default=24)
    result.add_argument("--spoilt", type=int, default=8)
    result.add_argument("--updates", type=int, default=2_600)
    result.add_argument(
        "--from",
        type=int,
        default=1_000,
        dest="begin",
        help="update from which sampled latents are ranked",
    )
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    if options.export is not None:
        export(options)
        return
    trajectories = (
        Trajectories.load(options.trajectories) if options.trajectories is not None else None
    )
    run(options, _pipeline(options.pipeline), trajectories)


if __name__ == "__main__":
    main()
