"""Generated pictures with verdicts, for the last phases of ``emoji-clip``: `python -m
diffalign.embedded.workshop.samples --pipeline FOLDER --out FILE [--prompts 400] [--images 8]
[--mix hard] [--exclude FILE --judge emoji-judge] [--official]`. Those of ``emoji-dit`` for
``emoji-clip-2`` need ``--judge emoji-judge-audit-2``.

For training, prompts are drawn from the world's own stream, not from GenEval's official list, and
verdicts come from the second judge. A test has other prompts and the first judge's verdicts: of the
same stream with ``--exclude`` and ``--judge emoji-judge``, or official ones with ``--official``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.core.types import Json, Pipeline
from diffalign.embedded.world.captions import words
from diffalign.embedded.world.scenes import DEFAULT_MIX, World
from diffalign.embedded.world.tokens import encode
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import Detector, verdicts
from diffalign.tasks.geneval.verdict import prompts as official

MIXES: dict[str, dict[str, float]] = {
    "world": DEFAULT_MIX,
    "hard": {"colour": 0.08, "two": 0.14, "count": 0.2, "position": 0.32, "two_coloured": 0.26},
    "relations": {"position": 0.65, "two_coloured": 0.35},
}
"""Mixtures of prompts: the world's, those that ``emoji`` often gets wrong, and the two kinds of
these that a reward confuses."""


MIRROR = {"left": "right", "right": "left"}
OPPOSITE = {**MIRROR, "above": "below", "below": "above"}


def reworded(caption: str, table: dict[str, str]) -> str:
    """A caption with the words of ``table`` replaced."""
    return " ".join(table.get(word, word) for word in caption.split())


def mirrored(
    images: Tensor, captions: Sequence[str], rng: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Half of the groups of pictures [G, n, 3, H, W] mirrored, and left and right exchanged in
    their captions."""
    turned = torch.rand(len(captions), generator=rng) < 0.5
    images = torch.where(turned.view(-1, 1, 1, 1, 1), images.flip(-1), images)
    pairs = zip(captions, turned.tolist(), strict=True)
    return images, [reworded(text, MIRROR) if turn else text for text, turn in pairs]


@dataclass(frozen=True)
class Samples:
    """Generated pictures with verdicts."""

    # uint8 [P, n, 3, 64, 64]
    images: Tensor
    # P of them
    captions: tuple[str, ...]
    # whether each picture is, bool [P, n]
    right: Tensor

    def groups(self, count: int, rng: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """``count`` prompts that have both right and wrong pictures: float images [count, n, 3, 64,
        64] in [0, 1], captions and verdicts.

        ValueError if no prompt has both.
        """
        mixed = (self.right.any(1) & ~self.right.all(1)).nonzero().flatten()
        if not len(mixed):
            raise ValueError(
                "Samples must hold a prompt with right and wrong pictures; there is none. Generate "
                "more pictures per prompt."
            )
        turns = mixed[torch.randint(len(mixed), (count,), generator=rng)]
        return (
            self.images[turns].float() / 255,
            [self.captions[i] for i in turns.tolist()],
            self.right[turns],
        )

    @staticmethod
    def ids(captions: Sequence[str], vocab: dict[str, int]) -> Tensor:
        """Token ids [n, 24] of captions in the world's grammar."""
        return torch.tensor([encode(vocab, " ".join(words(caption))) for caption in captions])

    def save(self, path: Path) -> None:
        """Write to one file."""
        torch.save(
            {"images": self.images, "captions": json.dumps(self.captions), "right": self.right},
            path,
        )

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Inverse of ``save``."""
        table = torch.load(path, weights_only=True)
        return cls(table["images"], tuple(json.loads(table["captions"])), table["right"])

    @classmethod
    def joined(cls, paths: Sequence[Path]) -> Samples:
        """The samples of several files with equally many pictures a prompt."""
        parts = [cls.load(path) for path in paths]
        return cls(
            torch.cat([part.images for part in parts]),
            tuple(caption for part in parts for caption in part.captions),
            torch.cat([part.right for part in parts]),
        )


def training_prompts(
    seed: int,
    count: int,
    mix: dict[str, float] = DEFAULT_MIX,
    exclude: Collection[str] = (),
) -> dict[str, Json]:
    """``count`` different captions of the world that are neither official prompts nor in
    ``exclude`` -> metadata; ``mix``: kinds of scene and their weights."""
    known = {record["prompt"] for record in official()} | set(exclude)
    records: dict[str, Json] = {}
    for scene in World(mix).scenes(seed, 20 * count):
        if (
            scene.tag
            and len(records) < count
            and (record := scene.metadata())["prompt"] not in known
        ):
            records.setdefault(record["prompt"], record)
    return records


def official_prompts(count: int) -> dict[str, Json]:
    """``count`` official prompts, spread evenly over the list -> metadata."""
    table = official()
    return {
        str(table[i]["prompt"]): dict(table[i])
        for i in (len(table) * k // count for k in range(count))
    }


def generate(
    pipe: Pipeline,
    judge: Detector,
    records: dict[str, Json],
    images: int,
    seed: int,
    *,
    scale: float = 3.0,
    steps: int = 20,
    batch: int = 16,
) -> Samples:
    """``images`` pictures for each caption of ``records``, with the judge's verdicts.

    Cost: ``2 * steps`` denoiser rows a picture.
    """
    jobs = jobs_of(records, count=images, base=seed)
    call = {"num_inference_steps": steps, "guidance_scale": scale}
    pictures, right = [], []
    for results in samples(pipe, (), jobs, batch=batch, call=call):
        stack = torch.stack([result.image for result in results])
        answers = verdicts(judge, stack, [records[result.job.prompt] for result in results])
        right += [answer is not None and answer.correct for answer in answers]
        pictures.append((stack * 255).round().byte())
    shape = (len(records), images)
    return Samples(
        torch.cat(pictures).reshape(*shape, *pictures[0].shape[1:]),
        tuple(records),
        torch.tensor(right).view(shape),
    )


def main() -> None:
    """Command line."""
    from diffalign.embedded.load import load, pipeline_in

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--official", action="store_true", help="official prompts and the first judge, for the test"
    )
    parser.add_argument("--mix", choices=list(MIXES), default="world", help="kinds of prompts")
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=(), help="samples whose prompts are left out"
    )
    parser.add_argument(
        "--judge",
        help="emoji-judge-audit, and with --official emoji-judge, unless another is named",
    )
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = load(options.judge or ("emoji-judge" if options.official else "emoji-judge-audit"))
    if options.official:
        records = official_prompts(options.prompts)
    else:
        exclude = {text for file in options.exclude for text in Samples.load(file).captions}
        mix = MIXES[options.mix]
        records = training_prompts(options.seed, options.prompts, mix, exclude)
    pipe = pipeline_in(options.pipeline).to(getattr(torch, options.dtype))
    call = {"scale": options.scale, "steps": options.steps}
    generate(pipe, judge, records, options.images, options.seed, **call).save(options.out)


if __name__ == "__main__":
    main()
