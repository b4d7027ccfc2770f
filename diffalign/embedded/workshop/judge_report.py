"""How good a judge is: ``python -m diffalign.embedded.workshop.judge_report --model emoji-judge
[--vae FOLDER] [--count 2000]`` prints JSON.

Scenes are the world's held-out ones. Figures: precision and recall (right class, intersection over
union >= .5, at the judge's threshold), mean overlap, share of right colours among matched tinted
objects, GenEval verdicts on true prompts and on wrong ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffalign.core.types import Json
from diffalign.embedded.workshop.degrade import round_trip
from diffalign.embedded.world.editions import EDITIONS, FIRST, Edition
from diffalign.embedded.world.scenes import HELD_OUT, Scene, World
from diffalign.embedded.world.vocabulary import NATIVE
from diffalign.generate.verdicts import Detector
from diffalign.tasks.geneval.verdict import Detection, Thresholds, verdict

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) with exclusive ends."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def detection_figures(
    scenes: Sequence[Scene], answers: Sequence[Sequence[Detection]], threshold: float
) -> dict[str, float]:
    """Precision, recall, mean overlap of matches and colour accuracy over tinted matches."""
    found, truths, overlaps, tinted, right = 0, 0, [], 0, 0
    for scene, detections in zip(scenes, answers, strict=True):
        free = list(scene.objects)
        truths += len(free)
        for detection in (d for d in detections if d.score > threshold):
            found += 1
            same = [
                (overlap(detection.box, thing.box), i)
                for i, thing in enumerate(free)
                if thing.name == detection.name
            ]
            if same and max(same)[0] >= 0.5:
                thing = free.pop(max(same)[1])
                overlaps.append(max(same)[0])
                if thing.colour != NATIVE:
                    tinted += 1
                    right += detection.colour == thing.colour
    matched = len(overlaps)
    return {
        "precision": matched / found if found else math.nan,
        "recall": matched / truths,
        "overlap": sum(overlaps) / matched if matched else math.nan,
        "colour": right / tinted if tinted else math.nan,
    }


def verdict_figures(
    metadata: Sequence[Json],
    answers: Sequence[Sequence[Detection]],
    thresholds: Thresholds,
) -> dict[str, float]:
    """Share of "correct" verdicts overall ("all") and per GenEval category."""
    correct: dict[str, list[bool]] = {"all": []}
    for record, detections in zip(metadata, answers, strict=True):
        answer = verdict(record, detections, thresholds).correct
        correct["all"].append(answer)
        correct.setdefault(record["tag"], []).append(answer)
    return {tag: sum(values) / len(values) for tag, values in correct.items()}


def detections(
    judge: Detector,
    scenes: Sequence[Scene],
    vae: AutoencoderTiny | None,
    spread: float,
    batch: int = 64,
) -> list[list[Detection]]:
    """The judge's answers on the scenes, or on their round trips through ``vae`` with latent
    noise of exactly ``spread`` deviations."""
    answers: list[list[Detection]] = []
    rng = torch.Generator().manual_seed(5)
    for start in range(0, len(scenes), batch):
        images = (
            torch.from_numpy(np.stack([scene.image for scene in scenes[start : start + batch]]))
            .permute(0, 3, 1, 2)
            .float()
            / 255
        )
        answers += judge.detect(
            images if vae is None else round_trip(vae, images, rng, spread, exact=True)
        )
    return answers


def report(
    judge: Detector,
    count: int,
    vae: AutoencoderTiny | None = None,
    spread: float = 0.0,
    seed: int = HELD_OUT[0],
    edition: Edition = FIRST,
) -> Json:
    """All figures on ``count`` scenes from ``seed`` and as many wrong prompts from the next
    seed."""
    world = World(edition=edition)
    scenes = list(world.scenes(seed, count))
    answers = detections(judge, scenes, vae, spread)
    tagged = [i for i, scene in enumerate(scenes) if scene.tag]
    wrong = list(world.wrong(seed + 1, count))
    answers_wrong = detections(judge, [scene for scene, _ in wrong], vae, spread)
    figures = {
        "detection": detection_figures(scenes, answers, judge.thresholds.threshold),
        "correct on true prompts": verdict_figures(
            [scenes[i].metadata() for i in tagged], [answers[i] for i in tagged], judge.thresholds
        ),
        "correct on wrong prompts": verdict_figures(
            [record for _, record in wrong], answers_wrong, judge.thresholds
        ),
    }
    return {
        name: {key: round(value, 4) for key, value in table.items()}
        for name, table in figures.items()
    }


def sweep(
    judge: Detector,
    count: int,
    vae: AutoencoderTiny,
    spread: float,
    seed: int,
    edition: Edition = FIRST,
) -> list[dict[str, float]]:
    """How the figures depend on the thresholds, on half renderings and half noisy round trips of
    ``count`` validation scenes each; how the shipped thresholds were chosen. Both thresholds
    take the same value in a row."""
    world = World(edition=edition)
    scenes, wrong = list(world.scenes(seed, count)), list(world.wrong(seed + 1, count))
    ways = ((None, 0.0), (vae, spread))
    answers = [detections(judge, scenes, *way) for way in ways]
    fooled = [detections(judge, [scene for scene, _ in wrong], *way) for way in ways]
    tagged = [i for i, scene in enumerate(scenes) if scene.tag]
    records = [scenes[i].metadata() for i in tagged]
    rows = []
    for step in range(2, 15):
        value = step / 20
        limits = Thresholds(threshold=value, counting_threshold=value)
        row = detection_figures(scenes * 2, answers[0] + answers[1], value)
        right = verdict_figures(
            records * 2, [answer[i] for answer in answers for i in tagged], limits
        )
        row |= {"true": right["all"], "true counting": right.get("counting", math.nan)}
        row["wrong"] = verdict_figures(
            [record for _, record in wrong] * 2, fooled[0] + fooled[1], limits
        )["all"]
        rows.append({"threshold": value} | {key: round(figure, 4) for key, figure in row.items()})
    return rows


def main() -> None:
    """Command line."""
    from diffalign.embedded.load import load
    from diffalign.embedded.workshop.train_judge import load_vae

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-judge")
    parser.add_argument("--folder", type=Path, help="a folder with another export of the model")
    parser.add_argument(
        "--vae",
        type=Path,
        help="folder of the autoencoder: judge round trips instead of renderings",
    )
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="latent noise of the round trips, in standard deviations",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="figures for a range of thresholds; give a --seed that is not held out",
    )
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=HELD_OUT[0])
    parser.add_argument("--edition", choices=list(EDITIONS), default=FIRST.name)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder is None:
        judge = load(options.model)
    else:
        from diffalign.embedded.load import MODELS

        judge = MODELS[options.model].loader(options.folder)
    vae = load_vae(options.vae).float() if options.vae is not None else None
    edition = EDITIONS[options.edition]
    if options.sweep:
        for row in sweep(judge, options.count, vae, options.spread, options.seed, edition):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    figures = report(judge, options.count, vae, options.spread, options.seed, edition)
    sys.stdout.write(
        json.dumps(
            {"model": options.model, "count": options.count, "seed": options.seed, **figures},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
