"""The evidence set: how every technique is measured on an embedded model, and how two runs are
compared.

200 official GenEval prompts, stratified by tag, x 2 seeds; another 100 prompts for choosing
thresholds. A run is a folder with one JSON line per image and its picture; it resumes by skipping
prompts that are finished. One prompt's images stay in one batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.core.seeds import seed_of as image_seed
from diffalign.core.technique import Technique
from diffalign.core.types import Json, Pipeline
from diffalign.eval.statistics import Interval, interval
from diffalign.generate.seeds import Job
from diffalign.tasks.geneval.prompts import TAGS
from diffalign.tasks.geneval.verdict import prompts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffalign.generate.samples import Sample
    from diffalign.generate.verdicts import Detector

Scorer = Callable[["Tensor", Sequence[str]], "Tensor"]
"""Images [B, 3, H, W] in [0, 1] and their prompts -> [B] scores."""


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


def measure(
    pipe: Pipeline,
    judge: Detector,
    config: Config,
    folder: Path,
    *,
    prompt_ids: Sequence[int],
    samples: int = 2,
    batch: int = 16,
    scorers: Mapping[str, Scorer] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Generate, judge and record ``samples`` images of each prompt under ``config``; finished
    prompts are read from ``folder``.

    ``seconds`` of a record: of one image, in processor time on a CPU with one thread (so that other
    load does not count), else on the wall. ``batch``: images per call, a multiple of ``samples``.
    ``scorers``: name -> ``f(images [B, 3, H, W], prompts) -> [B]``.
    Cost: ``len(prompt_ids) * samples`` images. Raises ValueError when ``folder`` holds a run with
    other settings.
    """
    if batch % samples:
        raise ValueError(
            f"batch must be a multiple of samples={samples}, so that a prompt's images share a "
            f"batch; got {batch}."
        )
    write_manifest(pipe, judge, config, folder, samples, batch)
    lines = folder / "records.jsonl"
    records = {(r["prompt_id"], r["sample"]): r for r in read_lines(lines)}
    missing = [n for n in prompt_ids if any((n, k) not in records for k in range(samples))]
    jobs = [
        Job(str(prompts()[n]["prompt"]), seed_of(n, k), f"{n}/{k}")
        for n in missing
        for k in range(samples)
    ]
    with lines.open("a") as file:
        for images, seconds in _timed(pipe, config, jobs, samples, batch):
            entries = _records(images, seconds, judge, samples, scorers or {})
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            records.update({(r["prompt_id"], r["sample"]): r for r in entries})
            progress(len(entries))
    return Measured(config, tuple(records[n, k] for n in prompt_ids for k in range(samples)))


def write_manifest(
    pipe: Pipeline, judge: Detector, config: Config, folder: Path, samples: int, batch: int
) -> None:
    """Write what a run depends on.

    Raises ValueError when ``folder`` holds a run with other settings.
    """
    from diffalign.core.registry import to_config

    settings = {
        "techniques": [to_config(t) for t in config.techniques],
        "scale": config.scale,
        "steps": config.steps,
        "samples": samples,
        "batch": batch,
        "scheduler": type(pipe.scheduler).__name__,
        "model": fingerprint(getattr(pipe, "unet", None) or pipe.transformer),
        "judge": [
            fingerprint(judge.net) if hasattr(judge, "net") else type(judge).__name__,
            asdict(judge.thresholds),
        ],
    }
    manifest = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    if manifest.exists():
        previous = json.loads(manifest.read_text())
        differing = [key for key in settings if settings[key] != previous.get(key)]
        if differing or previous != settings:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(differing)}); give another "
                "folder or delete it."
            )
    manifest.write_text(json.dumps(settings, indent=1) + "\n")


def _timed(
    pipe: Pipeline, config: Config, jobs: Sequence[Job], samples: int, batch: int
) -> Iterator[tuple[list[Sample], float]]:
    """Batches of finished images, with the seconds of one image."""
    import torch

    from diffalign.generate import samples as sampling

    call: dict[str, float] = {"num_inference_steps": config.steps}
    if config.scale is not None:
        call["guidance_scale"] = config.scale
    alone = pipe.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    batches = sampling.samples(
        pipe, config.techniques, jobs, batch=batch, call=call, copies=samples
    )
    for _ in range(0, len(jobs), batch):
        start = clock()
        images = next(batches)
        yield images, (clock() - start) / len(images)


def _records(
    results: Sequence[Sample],
    seconds: float,
    judge: Detector,
    samples: int,
    scorers: Mapping[str, Scorer],
) -> list[Json]:
    """One record for each image of a batch."""
    import torch

    from diffalign.generate.verdicts import verdicts

    images = torch.stack([sample.image for sample in results])
    texts = [sample.job.prompt for sample in results]
    with torch.no_grad():
        scores = {name: scorer(images, texts).tolist() for name, scorer in scorers.items()}
    places = [tuple(map(int, sample.job.key.split("/"))) for sample in results]
    answers = verdicts(judge, images, [prompts()[n] for n, _ in places])
    report = results[0].report
    scales = [s for s in report.scale if s is not None]
    records = []
    for i, ((n, k), verdict) in enumerate(zip(places, answers)):
        assert verdict is not None
        record = {
            "prompt_id": n,
            "sample": k,
            "seed": results[i].job.seed,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "nfe": report.nfe,
            "seconds": seconds,
            "scale": sum(scales) / len(scales) if scales else 1.0,
            "spread": _spread(images, i, samples),
        }
        records.append(record | {name: values[i] for name, values in scores.items()})
    return records


def _spread(images: Tensor, i: int, samples: int) -> float:
    """Diversity: mean absolute pixel difference of image i to the other images of its prompt, in
    [0, 1]; 0 for a single sample."""
    first = i - i % samples
    others = [j for j in range(first, first + samples) if j != i]
    return (
        float(sum((images[i] - images[j]).abs().mean() for j in others) / len(others))
        if others
        else 0.0
    )


def read_lines(path: Path) -> list[Json]:
    """Records of a JSON lines file; a torn last line, left by an interruption, is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def fingerprint(network: Module) -> str:
    """Short hash of a network's weights, so that records of another model or judge are never mixed
    in."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
