"""Train ``emoji-clip``: ``python -m diffalign.embedded.workshop.train_clip --out FOLDER --tokenizer
FOLDER [--vae FOLDER] [--samples FILE ...] [--from FOLDER] [--resume]``.

Symmetric InfoNCE (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, arXiv:2103.00020) over pairs of scenes that differ in one fact, plus a two-way
choice within each pair, plus pictures with one spoilt object as further negatives of their
captions, plus readers of class and colour on every patch and of objects and numbers on the
embedding. From update ``--focus`` on most pairs differ in a relation or a binding, and the
embedding must also tell where each class is: a caption can then hold a relation as a difference of
places, and a binding as a sum of class-and-colour pairs. Five phases: renderings; round trips
through the autoencoder of ``emoji`` and objects spoilt in its latent space; generated pictures of
``emoji`` with verdicts of the *second* judge, ranked within their prompt; a drill in places, on
renderings of two objects whose relation is mostly turned round; pictures of ``emoji``, where the
highest score of a prompt also has to be a right picture's, and the caption with the opposite
relation below its own. The first judge is never used, so that it can measure what this reward is
worth. ``--from FOLDER`` goes on from exported weights, with a fresh optimiser and fresh readers of
patches and places.

``--edition second --from FOLDER`` makes ``emoji-clip-2``: a run of its own that starts with the
weights of ``emoji-clip``, whose patches are stretched over twice the side. What the autoencoder
does to a picture is then what the decoder of ``emoji-dit`` draws, and the judges are those of the
second edition.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.core.types import Json
from diffalign.embedded.nets.clip import MEAN, PATCHES, STD, build_clip, model_config
from diffalign.embedded.nets.judge import SIDE
from diffalign.embedded.workshop import codes, training
from diffalign.embedded.workshop.clip_loss import (
    chosen_right,
    contrast,
    number_loss,
    patch_loss,
    place_truth,
    ranked,
    scene_truth,
)
from diffalign.embedded.workshop.degrade import blurred, corrupt, morph, moved, noisy, round_trip
from diffalign.embedded.workshop.pairs import FOCUS, MIX, TURNED, Batch, batch
from diffalign.embedded.workshop.precision import autocast
from diffalign.embedded.workshop.samples import OPPOSITE, Samples, mirrored, reworded
from diffalign.embedded.workshop.train_judge import load_vae
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    ModulesTrainer,
    cosine,
    save_state,
    saved_state,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.world.editions import ALIGNED, EDITIONS, FIRST, SECOND, Edition
from diffalign.embedded.world.tokens import encode
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

PEAK, DRILL_PEAK, LAST_PEAK = 1e-3, 8e-4, 5e-4
"""Highest learning rates: of the first three phases, of the drill, and of the last."""
PHASES = ("updates", "vae_updates", "sample_updates", "drill_updates", "last_updates")
"""Options with the updates of each phase."""
DRILL, LAST = 3, 4
"""Numbers of the last two phases."""
WEIGHTS = {"contrast": 1.0, "choice": 1.0, "patches": 0.5, "objects": 0.1, "numbers": 0.3}
FOCUSED = {**WEIGHTS, "objects": 0.5, "places": 4.0}
DRILLED = {"contrast": 1.0, "choice": 2.0, "objects": 0.2, "places": 40.0}
"""Weights of the parts of the loss: before the focus, in it, and in the drill."""
SPREAD = 0.5
PATCH = "visual.conv1.weight"
"""The only weights whose size depends on the size of the images."""


def damaged(
    found: Batch,
    count: int,
    rng: torch.Generator,
    vae: AutoencoderTiny | None,
    edition: Edition = FIRST,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures as the reward meets them: the N of ``found`` and ``count`` copies with one object
    spoilt, shifted, blurred and noisy, float [N + count, 3, side, side]; their boxes; and which
    pictures were copied.

    With ``vae`` half of the clean ones take a round trip (a quarter of the larger ones, which cost
    more), and half of the copies are spoilt in its latent space.
    """
    clean = torch.from_numpy(found.images).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(found.truth)
    sources = torch.randperm(len(clean), generator=rng)[:count]
    spoilt, _ = corrupt(clean[sources], truth[sources], rng, share=1.0, edition=edition)
    if vae is not None:
        first = sources[: len(sources) // 2]
        share = 2 if edition is FIRST else 4
        through = torch.randperm(len(clean), generator=rng)[: len(clean) // share]
        if edition is FIRST:
            spoilt[: len(first)] = morph(vae, clean[first], truth[first], rng)
            clean[through] = round_trip(vae, clean[through], rng, SPREAD)
        else:
            latents = codes.codes(found.scenes)
            wrong = codes.spoilt(latents[first], [found.scenes[i] for i in first.tolist()], rng)
            spoilt[: len(first)] = codes.pictures(vae.decoder, wrong, rng)
            clean[through] = codes.pictures(vae.decoder, latents[through], rng, SPREAD)
    pictures = torch.cat([clean, spoilt])
    boxes = torch.cat([truth[..., 2:], truth[sources][..., 2:]]).float()
    pictures, boxes = moved(pictures, boxes, rng, share=0.3)
    pictures = noisy(blurred(pictures, rng), rng, share=0.4, fine=0.08, coarse=0.06).clamp(0, 1)
    return pictures, boxes, sources


class ClipTrainer(ModulesTrainer):
    """The state of a run. ``options`` needs seed, pairs, spoilt, groups and the updates of the five
    phases; ``vae`` serves all phases but the first and the drill, ``samples`` (see
    ``workshop.samples``) the third and the last."""

    plain_attention = True

    def __init__(
        self,
        options: argparse.Namespace,
        vocab: dict[str, int],
        vae: AutoencoderTiny | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.options, self.vocab, self.vae, self.samples = options, vocab, vae, samples
        self.edition = EDITIONS[options.edition]
        self.model, self.heads = build_clip(len(vocab), options.seed, self.edition.side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + 1)
            self.patches = nn.Linear(
                model_config(0)["vision_cfg"]["width"], len(OBJECTS) + 1 + len(COLOURS) + 2
            )
            self.places = nn.Linear(model_config(0)["embed_dim"], 2 * len(OBJECTS))
        modules = nn.ModuleList([self.model, self.heads, self.patches, self.places]).train()
        early = [p for module in modules[:3] for p in module.parameters()]
        groups = [
            {"params": [p for p in early if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in early if p.ndim <= 1], "weight_decay": 0.0},
            {"params": list(self.places.parameters()), "weight_decay": 0.05},
        ]
        super().__init__(modules, torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), fused=True))
        self.tokens: list[Tensor] = []
        self.model.visual.transformer.register_forward_hook(
            lambda _, __, output: self.tokens.append(output)
        )
        self.ends = np.cumsum([getattr(options, name) for name in PHASES]).tolist()

    @property
    def phase(self) -> int:
        """0 to 4."""
        return sum(self.done >= end for end in self.ends[:-1])

    @property
    def focused(self) -> bool:
        """Whether relations and bindings are in focus."""
        return bool(self.done >= self.options.focus)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pictures [2P + C, 3, side, side], token ids [2P, 24], truth of the first 2P float [2P,
        most, 6] with boxes in 64ths of a side, the table of equal facts [2P, 2P], and the caption
        of each spoilt picture (index [C])."""
        seed, rng = self.options.seed, step_generator(self.options.seed, 0, self.done)
        mix, weight, turned = FOCUS if self.focused else None, 10 if self.focused else 3, 0.0
        if self.phase >= DRILL:
            mix, weight, turned = (TURNED, 20, 0.7) if self.phase == DRILL else (MIX, 6, 0.7)
        plain = self.phase in (0, DRILL)
        edition = ALIGNED if self.edition is SECOND and not plain else self.edition
        found = batch(
            step_seed(seed, 0, self.done), self.options.pairs, mix, weight, turned, edition
        )
        if not plain and self.vae is None:
            raise ValueError(
                "Phases two, three and five need the autoencoder of the model whose pictures are "
                "to be judged; pass --vae FOLDER."
            )
        spoilt = 0 if self.phase == DRILL else self.options.spoilt
        vae = None if plain else self.vae
        pictures, boxes, sources = damaged(found, spoilt, rng, vae, edition)
        ids = torch.tensor([encode(self.vocab, caption) for caption in found.captions])
        boxes = boxes[: len(ids)] * (SIDE / edition.side)
        located = torch.cat([torch.from_numpy(found.truth[..., :2]).float(), boxes], dim=2)
        return pictures, ids, located, torch.from_numpy(found.same), sources

    def images(self, pictures: Tensor) -> Tensor:
        """Embeddings [B, 192] before normalisation."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        with autocast():
            embedding: Tensor = self.model.encode_image((pictures - mean) / std).float()
        return embedding

    def losses(self) -> dict[str, Tensor]:
        """The weighted parts of the loss of the next step."""
        pictures, ids, truth, same, _ = self.batch()
        size = len(ids)
        self.tokens.clear()
        embedding = self.images(pictures)
        with autocast():
            words = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        scale = self.model.logit_scale.exp()
        unit = F.normalize(embedding, dim=-1)
        both, choice = contrast(unit[:size], words, unit[size:], scale, same)
        per_patch = self.patches(self.tokens.pop()[:size, 1:].float())
        presence, numbers = scene_truth(truth)
        listing, counted = self.heads(embedding[:size])
        listed = F.binary_cross_entropy_with_logits(listing, presence, reduction="sum") / size
        where, there = place_truth(truth)
        placed = self.places(embedding[:size]).view(size, -1, 2) - where
        values = {
            "contrast": both,
            "choice": choice,
            "patches": patch_loss(per_patch, truth),
            "objects": listed,
            "numbers": number_loss(counted, numbers),
            "places": placed[there].square().mean(),
        }
        weights = FOCUSED if self.focused else WEIGHTS
        weights = DRILLED if self.phase == DRILL else weights
        parts = {name: weight * values[name] for name, weight in weights.items()}
        if self.phase in (2, LAST):
            similarity, opposite, right = self.compared(scale)
            parts["ranking"] = ranked(similarity, right)
            if self.phase == LAST:
                parts["chosen"] = chosen_right(similarity, right)
                parts["opposite"] = F.softplus(opposite - similarity)[right].mean()
        return parts

    def compared(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [G, n] of the generated pictures of G prompts, slightly changed, those with the
        opposite relation (minus infinity without a relation), and which pictures are right.

        In the last phase half of the groups are mirrored, with their captions.
        """
        if self.samples is None:
            raise ValueError("Phases three and five need generated pictures; pass --samples FILE.")
        rng = step_generator(self.options.seed, 1, self.done)
        pictures, captions, right = self.samples.groups(self.options.groups, rng)
        if self.phase == LAST:
            pictures, captions = mirrored(pictures, captions, rng)
        others = [reworded(caption, OPPOSITE) for caption in captions]
        flat = pictures.flatten(0, 1)
        flat, _ = moved(flat, torch.zeros(len(flat), 1, 4), rng)
        flat = noisy(flat, rng, share=0.3, fine=0.04, coarse=0.04).clamp(0, 1)
        images = F.normalize(self.images(flat), dim=-1).view(*pictures.shape[:2], -1)
        with autocast():
            ids = self.samples.ids([*captions, *others], self.vocab)
            words = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        own, opposite = (
            scale * torch.einsum("gnd,gd->gn", images, part) for part in words.chunk(2)
        )
        same = torch.tensor([a == b for a, b in zip(captions, others, strict=True)])
        return own, opposite.masked_fill(same[:, None], float("-inf")), right

    def settle(self) -> None:
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.0)

    def rate(self) -> float:
        """Learning rate of the next update."""
        return rate_of(self.done, self.ends)


def rate_of(done: int, ends: Sequence[int]) -> float:
    """Learning rate after ``done`` updates of phases that end at ``ends``.

    Constant in phase one after the warm-up, one cosine over the next two, or over all if phase one
    is all there is; constant in the drill, one cosine over the last.
    """
    first, _, third, drilled, last = ends
    if done >= drilled:
        return cosine(done - drilled, last - drilled, LAST_PEAK, warm=20, hold=0.2)
    if done >= third:
        return cosine(done - third, drilled - third, DRILL_PEAK, warm=50, hold=1.0)
    if done < first:
        alone = first == third
        hold, floor = (0.4, 0.02) if alone else (0.9, 0.6)
        return cosine(done, first, PEAK, warm=200, hold=hold, floor=floor)
    return cosine(done - first, third - first, 0.7 * PEAK, warm=50, hold=0.3)


def export(options: argparse.Namespace) -> None:
    """Write the saved state to ``options.export`` as fp16 safetensors in open_clip's form, with
    tokenizer, training record and log."""
    state, folder = saved_state(options.out / STATE), options.export
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(options.tokenizer)
    tokenizer.save_pretrained(folder)
    tables: dict[str, dict[str, Tensor]] = {"model": {}, "heads": {}}
    for name, value in state["trainer"]["modules"].items():
        module, _, key = name.partition(".")
        part = {"0": "model", "1": "heads"}.get(module)
        if part is not None:
            tables[part][key] = value.half().contiguous()
    save_file(tables["model"], folder / "open_clip_model.safetensors")
    save_file(tables["heads"], folder / "heads.safetensors")
    config = {
        "model_cfg": model_config(len(tokenizer.get_vocab()), EDITIONS[options.edition].side),
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(options.out / "log.jsonl", folder / "log.jsonl")
    record = {"seed": options.seed, "pairs": options.pairs, "spoilt": options.spoilt}
    record |= {"updates": state["trainer"]["done"], "seconds": round(state["seconds"])}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def begin(trainer: ClipTrainer, folder: Path, out: Path) -> None:
    """Write the state of a run that goes on from the weights in ``folder``, unless ``out`` has a
    state. In the first edition it has their count of updates, seconds and log; in another it starts
    anew."""
    if (out / STATE).exists():
        return
    for module, name in (
        (trainer.model, "open_clip_model.safetensors"),
        (trainer.heads, "heads.safetensors"),
    ):
        weights = {k: v.float() for k, v in load_file(folder / name).items()}
        if PATCH in weights:
            weights[PATCH] = stretched(weights[PATCH], trainer.edition.side // PATCHES)
        module.load_state_dict(weights)
    out.mkdir(parents=True, exist_ok=True)
    if trainer.edition is not FIRST:
        save_state(out / STATE, {"trainer": trainer.state(), "seconds": 0.0})
        return
    record = json.loads((folder / "training.json").read_text())
    trainer.done = record["updates"]
    shutil.copy(folder / "log.jsonl", out / "log.jsonl")
    save_state(out / STATE, {"trainer": trainer.state(), "seconds": record["seconds"]})


def stretched(kernel: Tensor, side: int) -> Tensor:
    """A kernel of patches [C, 3, n, n] for patches of ``side`` pixels, a multiple of n, that
    answers to an enlarged picture as before."""
    factor = side // kernel.shape[-1]
    return kernel.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2


def run(options: argparse.Namespace, vae: AutoencoderTiny | None, samples: Samples | None) -> None:
    """Train to the end of the last phase; a state every ``options.save`` updates."""
    trainer = ClipTrainer(options, _tokenizer(options.tokenizer).get_vocab(), vae, samples)
    if options.source is not None:
        begin(trainer, options.source, options.out)
        options.resume = True
    names = ("seed", "pairs", "spoilt", "groups", "focus", *PHASES)
    header: Json = {"model": "emoji-clip"} | {key: getattr(options, key) for key in names}
    if options.edition != FIRST.name:
        header |= {"edition": options.edition, "from": options.source and options.source.name}
    count = 2 * options.pairs + options.spoilt
    train(trainer, options, header, Course(trainer.ends[-1], count, options.save))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=31, save=50)
    result.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of the tokenizer of emoji"
    )
    result.add_argument(
        "--vae", type=Path, help="folder of the autoencoder; needed from phase two on"
    )
    result.add_argument(
        "--samples",
        type=Path,
        nargs="*",
        default=(),
        help="generated pictures, written by diffalign.embedded.workshop.samples; for phases "
        "three and five",
    )
    result.add_argument(
        "--from", dest="source", type=Path, help="folder of an export to go on from"
    )
    result.add_argument("--edition", choices=(FIRST.name, SECOND.name), default=FIRST.name)
    result.add_argument("--pairs", type=int, default=32)
    result.add_argument("--spoilt", type=int, default=16)
    result.add_argument("--updates", type=int, default=3_000, help="updates of phase one")
    result.add_argument("--vae-updates", type=int, default=0)
    result.add_argument("--sample-updates", type=int, default=0)
    result.add_argument("--drill-updates", type=int, default=0, help="updates of the drill")
    result.add_argument("--last-updates", type=int, default=0, help="updates of phase five")
    result.add_argument(
        "--groups", type=int, default=4, help="prompts of generated pictures in an update"
    )
    result.add_argument(
        "--focus",
        type=int,
        default=1_850,
        help="update from which relations and bindings are in focus",
    )
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    if options.export is not None:
        export(options)
        return
    vae = load_vae(options.vae) if options.vae is not None else None
    run(options, vae, Samples.joined(options.samples) if options.samples else None)


if __name__ == "__main__":
    main()
