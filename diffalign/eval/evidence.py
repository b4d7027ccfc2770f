"""The evidence set: how every technique is measured on an embedded model, and how two runs are
compared.

200 official GenEval prompts, stratified by tag, x 2 seeds; another 100 prompts for choosing
thresholds. The images are made and scored by the runner, so a run is a folder of its kind and goes
on where it was.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.core.seeds import seed_of as image_seed
from diffalign.core.technique import Technique
from diffalign.core.types import Json, Keywords, Pipeline
from diffalign.eval.benchmarks import Item, geneval
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import Plan, generate
from diffalign.eval.scorers.base import Outcome, Scorer
from diffalign.eval.scoring import Scores, pictures_of, score
from diffalign.eval.statistics import Interval, interval
from diffalign.tasks.geneval.prompts import TAGS
from diffalign.tasks.geneval.verdict import prompts

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.generate.models import Model
    from diffalign.generate.verdicts import Detector

Measure = Callable[["Tensor", Sequence[str]], "Tensor"]
"""Images [B, 3, H, W] in [0, 1] and their prompts -> [B] numbers."""


def stratified(count: int, *, offset: int = 0) -> list[int]:
    """Ids of ``count`` official prompts, as equal over the six tags as possible, in a fixed
    shuffled order within each tag.

    ``offset`` prompts per tag are skipped first, so that two sets can be disjoint. Raises
    ValueError when a tag runs out.
    """
    official = prompts()
    selected: list[int] = []
    for i, tag in enumerate(TAGS):
        ids = [n for n, item in enumerate(official) if item["tag"] == tag]
        order = sorted(
            ids, key=lambda n: hashlib.sha256(f"diffalign evidence {n}".encode()).digest()
        )
        take = count // len(TAGS) + (i < count % len(TAGS))
        if offset + take > len(ids):
            raise ValueError(
                f"stratified({count}, offset={offset}) needs {offset + take} prompts of {tag}; "
                f"there are {len(ids)}."
            )
        selected += order[offset : offset + take]
    return sorted(selected)


def evidence_prompts() -> list[int]:
    """The 200 prompts that every claim is measured on."""
    return stratified(200)


def tuning_prompts() -> list[int]:
    """The 100 other prompts on which thresholds and defaults are chosen."""
    return stratified(100, offset=34)


def tag_of(prompt_id: int) -> str:
    """The tag of an official prompt."""
    return str(prompts()[prompt_id]["tag"])


def seed_of(prompt_id: int, sample: int, base: int = 0) -> int:
    """The seed of one image, the same for every technique and batch size."""
    return image_seed(f"geneval/{prompt_id}", sample, base)


@dataclass(frozen=True, slots=True)
class Config:
    """One column of a comparison."""

    name: str
    # none: the pipeline's own guidance
    techniques: tuple[Technique, ...] = ()
    # of the call; None is the pipeline's own
    scale: float | None = None
    steps: int = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished run: one record per image, in prompt order."""

    config: Config
    records: tuple[Json, ...]

    def per_prompt(self, key: str = "correct") -> dict[int, float]:
        """Prompt id -> mean of ``key`` over its images."""
        values: dict[int, list[float]] = {}
        for record in self.records:
            values.setdefault(record["prompt_id"], []).append(float(record[key]))
        return {n: sum(v) / len(v) for n, v in values.items()}

    def mean(self, key: str) -> float:
        return float(np.mean([record[key] for record in self.records]))

    def score(self, **options: Any) -> Interval:
        """Mean over tags of the share of correct images, with its interval.

        Not GenEval's overall: a subset of its prompts.
        """
        values = self.per_prompt()
        return interval(list(values.values()), [tag_of(n) for n in values], **options)

    def tags(self) -> dict[str, float]:
        values = self.per_prompt()
        by_tag: dict[str, list[float]] = {tag: [] for tag in TAGS}
        for n, value in values.items():
            by_tag[tag_of(n)].append(value)
        return {tag: float(np.mean(v)) for tag, v in by_tag.items() if v}


def compare(a: Measured, b: Measured, key: str = "correct", **options: Any) -> Interval:
    """``a`` minus ``b``, paired by prompt.

    Raises ValueError unless both hold the same prompts and seeds.
    """
    seeds = [[(r["prompt_id"], r["sample"], r["seed"]) for r in m.records] for m in (a, b)]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"{a.config.name} and {b.config.name} were not run on the same prompts and seeds; a "
            "paired comparison needs that."
        )
    ours, theirs = a.per_prompt(key), b.per_prompt(key)
    return interval([ours[n] - theirs[n] for n in ours], [tag_of(n) for n in ours], **options)


@dataclass(slots=True)
class Function:
    """A function of images and prompts as a scorer of the runner."""

    name: str
    function: Measure

    def facts(self) -> Json:
        """Its name; a function has no revision."""
        return {"name": self.name, "of": type(self.function).__name__}

    def knows(self, item: Item) -> bool:
        """Every prompt."""
        return True

    def canary(self) -> str | None:
        """It is no judge, so nothing is known to be right."""
        return None

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """The function's numbers for the images of one prompt."""
        import torch

        with torch.no_grad():
            values = self.function(torch.stack(list(images)), [item.prompt] * len(images))
        return [Outcome(float(value), "", {}) for value in values]


def spread(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Diversity of one prompt's images [B, 3, H, W]: the mean absolute pixel difference of each to
    the others, in [0, 1]; 0 for a single one."""
    differences = (images[:, None] - images[None]).abs().mean((2, 3, 4))
    return differences.sum(1) / max(len(images) - 1, 1)


def measure(
    pipe: Pipeline,
    judge: Detector,
    config: Config,
    folder: Path,
    *,
    prompt_ids: Sequence[int],
    samples: int = 2,
    scorers: Mapping[str, Measure] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Make ``samples`` images of each prompt under ``config`` and score them, as a run in
    ``folder``; what is finished there is not done again.

    ``seconds`` of a record: of one image, in processor time on a CPU, so that other load does not
    count, else on the wall. ``scorers``: name -> function of images and prompts.
    Cost: ``len(prompt_ids) * samples`` images. Raises: ``RunError`` when ``folder`` holds another
    run.
    """
    from diffalign.eval.scorers.emoji import EmojiScorer

    benchmark = geneval()
    plan = Plan(benchmark, _model(pipe, config), config.techniques, samples)
    run = RunFolder.begin(folder, plan.settings())
    items = [benchmark.items[n] for n in prompt_ids]
    generate(plan, run, items, progress=progress)
    everyone: list[Scorer] = [EmojiScorer("judge", judge), Function("spread", spread)]
    everyone += [Function(name, function) for name, function in (scorers or {}).items()]
    numbers = set(prompt_ids)
    pictures = [p for p in pictures_of(run) if p.item.index in numbers]
    for scorer in everyone:
        score(scorer, run, pictures)
    places = [Scores.begin(run.path, scorer) for scorer in everyone]
    return Measured(config, tuple(r for item in items for r in _records(run, item, places)))


def _model(pipe: Pipeline, config: Config) -> Model:
    """A loaded pipeline as the runner takes it."""
    from diffalign.families import family_of
    from diffalign.generate.models import Model

    family = family_of(type(pipe))
    gate = family.gates[0]
    call: Keywords = {"num_inference_steps": config.steps}
    native = inspect.signature(type(pipe).__call__).parameters[gate].default
    if config.scale is not None:
        native = call[gate] = family.native(config.scale)
    name = type(pipe).__name__
    return Model(name, "folder", pipe, config.steps, family.scale(native), call, {})


def _records(run: RunFolder, item: Item, places: Sequence[Scores]) -> list[Json]:
    """One record for each image of a prompt."""
    unit, timing = run.record(item), run.timing(item)
    assert unit is not None
    on_cpu = run.settings["device"] == "cpu"
    seconds = timing["processor_seconds" if on_cpu else "seconds"] / timing["images"]
    hashes = [sample["sha256"] for sample in unit["samples"]]
    columns = {place.facts["name"]: place.read(item, hashes) or [] for place in places}
    judge = columns.pop("judge")
    return [
        {
            "prompt_id": item.index,
            "sample": k,
            "seed": sample["seed"],
            "correct": judge[k]["score"] == 1.0,
            "reason": judge[k]["reason"],
            "nfe": sample["nfe"],
            "seconds": seconds,
            "scale": unit["report"]["scale"] or 1.0,
        }
        | {name: column[k]["score"] for name, column in columns.items()}
        for k, sample in enumerate(unit["samples"])
    ]
