"""Scoring the images of a run, or of a folder in the official layout that another tool made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.core.types import Json
from diffalign.eval.benchmarks import Item
from diffalign.eval.files import RunError, digest, file_digest, read_json, storage, write_json
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import json_data, one_thread
from diffalign.eval.scorers.base import Outcome, Scorer

if TYPE_CHECKING:
    from torch import Tensor


def read_image(path: Path, expected: str = "", advice: str = "Replace it.") -> Tensor:
    """An image file as [3, H, W] in [0, 1]; ``expected``: the SHA-256 of the file, "" for any;
    ``advice``: what to do with a bad one.

    Raises: ``RunError`` for a file that is missing, changed or no whole image.
    """
    import numpy as np
    import torch
    from PIL import Image

    current = file_digest(path)
    if current is None:
        raise RunError(f"the image {path} is missing. {advice}")
    if expected and current != expected:
        raise RunError(f"the image {path} is not the one of its record: it was changed. {advice}")
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise RunError(f"the image {path} cannot be read ({error}). {advice}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@dataclass(frozen=True, slots=True)
class Scores:
    """Where the outcomes of a scorer lie in a folder."""

    folder: Path
    # what defines the scores
    facts: Json

    @classmethod
    def begin(cls, folder: Path, scorer: Scorer) -> Scores:
        """The place of a scorer, new or to be continued.

        Raises: ``RunError`` where other models or thresholds of that name have scored.
        """
        place, facts = folder / "scores" / scorer.name, json_data(scorer.facts())
        with storage(folder):
            before = read_json(place / "scorer.json")
            if before is not None and before != facts:
                raise RunError(
                    f"{place} holds scores of another {scorer.name}: {before} there and {facts} "
                    "here. Remove that folder to score again."
                )
            if before is None:
                write_json(place / "scorer.json", facts)
        return cls(place, facts)

    def file(self, item: Item) -> Path:
        """The outcomes of one unit."""
        return self.folder / f"{item.name}.json"

    def key(self, hashes: Sequence[str]) -> str:
        """Content key: the scorer and the images."""
        return digest([self.facts, list(hashes)])

    def read(self, item: Item, hashes: Sequence[str]) -> list[Json] | None:
        """The outcomes for images of these hashes, None where there are none."""
        entry = read_json(self.file(item))
        if entry is None or entry.get("key") != self.key(hashes):
            return None
        samples: list[Json] = entry["samples"]
        return samples

    def write(self, pictures: Pictures, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes of one unit."""
        samples = [
            {"file": file, "score": o.score, "reason": o.reason, "measured": o.measured}
            for file, o in zip(pictures.files, outcomes, strict=True)
        ]
        entry = {"key": self.key(pictures.hashes), "samples": samples}
        write_json(self.file(pictures.item), json_data(entry))


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of one prompt that are to be scored."""

    item: Item
    # paths below ``images``
    files: tuple[str, ...]
    hashes: tuple[str, ...]


def pictures_of(folder: RunFolder, item: Item | None = None) -> list[Pictures]:
    """The finished units of a run, or only that of ``item``."""
    if item is None:
        entries = list(folder.entries())
    else:
        record = folder.record(item)
        entries = [] if record is None else [(item, record)]
    return [
        Pictures(
            item,
            tuple(sample["file"] for sample in record["samples"]),
            tuple(sample["sha256"] for sample in record["samples"]),
        )
        for item, record in entries
    ]


def check(scorer: Scorer) -> None:
    """Give a scorer its canary.

    Raises: ``RunError`` when it is broken.
    """
    with one_thread("cpu"):
        problem = scorer.canary()
    if problem is not None:
        raise RunError(f"{scorer.name} is broken: {problem}. No image was scored.")


def score(
    scorer: Scorer,
    folder: RunFolder,
    pictures: Sequence[Pictures],
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda images: None,
) -> int:
    """Score the images of ``pictures`` that ``folder`` holds no scores of; how many prompts were.

    The canary comes first. Raises: ``RunError`` when the scorer is broken or an image cannot be
    read; scores that are written are kept.
    """
    place = Scores.begin(folder.path, scorer)
    unknown = [p.item for p in pictures if not scorer.knows(p.item)]
    if unknown:
        raise RunError(
            f"{scorer.name} cannot score {len(unknown)} of {len(pictures)} prompts, first "
            f"{unknown[0].prompt!r} ({unknown[0].tag}). Give another --scorer, or --category."
        )
    missing = [p for p in pictures if place.read(p.item, p.hashes) is None]
    if missing:
        check(scorer)
    score_units(scorer, folder, missing, device, progress)
    return len(missing)


def score_units(
    scorer: Scorer,
    folder: RunFolder,
    pictures: Sequence[Pictures],
    device: str,
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """``score`` by a scorer that has been checked."""
    place, images = Scores.begin(folder.path, scorer), image_root(folder)
    foreign = "images" in folder.settings
    advice = "Replace it." if foreign else "Make it again with `diffalign eval generate`."
    for p in pictures:
        if place.read(p.item, p.hashes) is not None:
            continue
        tensors = [
            read_image(images / file, expected, advice)
            for file, expected in zip(p.files, p.hashes, strict=True)
        ]
        with one_thread(device):
            outcomes = scorer.score(tensors, p.item)
        _check(scorer, p, outcomes)
        with storage(folder.path):
            place.write(p, outcomes)
        progress(len(p.files))


def image_root(folder: RunFolder) -> Path:
    """Where the images of a run are: inside it, or where another tool left them."""
    elsewhere = folder.settings.get("images")
    return Path(elsewhere) if elsewhere else folder.path / "images"


def _check(scorer: Scorer, pictures: Pictures, outcomes: Sequence[Outcome]) -> None:
    """Raise ``RunError`` for a score that is no number in [0, 1]."""
    for file, outcome in zip(pictures.files, outcomes, strict=True):
        if not (math.isfinite(outcome.score) and -1.0 <= outcome.score <= 1.0):
            raise RunError(
                f"{scorer.name} returned {outcome.score} for {file} ({pictures.item.prompt!r}), "
                "and a score is a finite number of at most 1. Scores before it are kept."
            )
