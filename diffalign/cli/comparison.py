"""Every column of a comparison on the same noise: images, costs and verdicts, as a contact sheet
and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from diffalign import __version__
from diffalign.cli import show
from diffalign.cli.request import Request
from diffalign.core.technique import Technique
from diffalign.core.types import Json
from diffalign.drawing.png import save_png
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.generate.models import Model
from diffalign.generate.samples import Sample, merged, picture, samples
from diffalign.generate.seeds import Job
from diffalign.generate.verdicts import Detector, verdicts
from diffalign.seams import Report
from diffalign.tasks.geneval.verdict import Verdict, parse_prompt


@dataclass(frozen=True, slots=True)
class Column:
    """One variant of every image; no technique is the plain pipeline."""

    label: str
    techniques: tuple[Technique, ...]
    samples: tuple[Sample, ...]
    files: tuple[Path, ...]
    # one per image, None without one
    verdicts: tuple[Verdict | None, ...]
    # of all batches
    report: Report

    @property
    def correct(self) -> list[bool]:
        """Right or wrong, for the images that have a verdict."""
        return [verdict.correct for verdict in self.verdicts if verdict is not None]

    @property
    def guides(self) -> bool:
        """Whether one of its techniques forms the prediction."""
        return any(technique.seam == "denoiser" for technique in self.techniques)

    def scale(self, model: Model) -> float | None:
        """Mean effective scale over the guided steps; without a guidance of ours the pipeline's own
        scale."""
        if not self.guides:
            return model.scale
        values = [value for value in self.report.scale if value is not None]
        return sum(values) / len(values) if values else None

    def guided_steps(self, model: Model) -> int:
        """Steps that guided at least one image."""
        if self.guides:
            return self.report.guided_steps
        return self.report.steps if model.scale != 1.0 else 0


def compare(
    request: Request, variants: Sequence[tuple[str, tuple[Technique, ...]]], quiet: bool
) -> tuple[list[Column], str]:
    """Run every variant, label and techniques, and save each image as soon as its batch is done.

    Also returns why there are no verdicts, "" if there are.
    """
    model, jobs = request.model, request.jobs
    judge, why = judge_of(model, request.prompts)
    folder = request.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[Column] = []
    saved = 0
    try:
        with show.progress(len(variants) * request.calls * model.steps, quiet) as bar:
            warm_up(request, jobs)
            for number, (label, techniques) in enumerate(variants):
                results: list[Sample] = []
                answers: list[Verdict | None] = []
                reports = []
                for batch in samples(
                    model.pipe,
                    techniques,
                    jobs,
                    batch=request.batch,
                    call=model.call,
                    facts=request.facts,
                    step=bar(label),
                ):
                    for sample in batch:
                        path = folder / f"{number:02d}-{sample.job.key}.png"
                        save_png(picture(sample.image), path, sample.settings)
                        saved += 1
                    answers += judged(judge, batch)
                    results += batch
                    reports.append(batch[0].report)
                files = [folder / f"{number:02d}-{job.key}.png" for job in jobs]
                columns.append(
                    Column(
                        label,
                        techniques,
                        tuple(results),
                        tuple(files),
                        tuple(answers),
                        merged(reports),
                    )
                )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{saved} of {len(variants) * len(jobs)} images are kept in {folder}"
        ) from None
    return columns, why


def warm_up(request: Request, jobs: Sequence[Job]) -> None:
    """Two plain steps of the first batch, so that one-time costs fall on no column."""
    call = {**request.model.call, "num_inference_steps": 2}
    next(samples(request.model.pipe, (), jobs[: request.batch], batch=request.batch, call=call))


def judge_of(model: Model, prompts: Sequence[str]) -> tuple[Detector | None, str]:
    """The judge for this model, or None and the reason why these prompts get no verdicts."""
    from diffalign.embedded import available, load
    from diffalign.embedded.load import MODELS

    if model.kind != "embedded":
        return None, "no verdicts: only embedded models have a judge on board."
    name = MODELS[model.name].judge
    if not any(parse_prompt(prompt) for prompt in prompts):
        return (
            None,
            "no verdicts: no prompt is in GenEval's grammar (like 'a photo of a red apple and a "
            "green clock').",
        )
    if name not in {entry.name for entry in available()}:
        return None, f"no verdicts: {name} is not installed."
    return load(name), ""


def judged(judge: Detector | None, batch: Sequence[Sample]) -> list[Verdict | None]:
    """The verdicts on a batch, all None without a judge."""
    if judge is None:
        return [None] * len(batch)
    records = [parse_prompt(sample.job.prompt) for sample in batch]
    return verdicts(judge, torch.stack([sample.image for sample in batch]), records)


def sheet(request: Request, columns: Sequence[Column], title: str = "") -> Image.Image:
    """Prompts down, columns across, each with its cost; frames and reasons where there are
    verdicts."""

    def cell(column: Column, i: int) -> Cell:
        verdict = column.verdicts[i]
        return Cell(
            picture(column.samples[i].image),
            caption=verdict.reason if verdict else "",
            correct=verdict.correct if verdict else None,
        )

    model = request.model
    jobs = [sample.job for sample in columns[0].samples]
    count = len(jobs) // len(request.prompts)
    rows = [
        job.prompt + (f"\nimage {i % count + 1}" if count > 1 else "") for i, job in enumerate(jobs)
    ]
    heads = [f"{column.label}\n{column.report.nfe:.4g} NFE per image" for column in columns]
    return contact_sheet(
        [[cell(column, i) for column in columns] for i in range(len(jobs))],
        rows,
        heads,
        title=title,
        footer=f"{model.name}, {model.scheduler}, {model.steps} steps, "
        f"seed {request.facts['base_seed']}; the same noise in every column",
    )


def data(request: Request, columns: Sequence[Column], why: str) -> Json:
    """The comparison as JSON data."""
    settings = columns[0].samples[0].settings
    common = {
        key: value
        for key, value in settings.items()
        if key not in ("techniques", "prompt", "seed", "base_seed")
    }
    images = []
    for column in columns:
        for sample, path, verdict in zip(column.samples, column.files, column.verdicts):
            images.append(
                {
                    "column": column.label,
                    "prompt": sample.job.prompt,
                    "seed": sample.job.seed,
                    "file": str(path),
                    "correct": verdict.correct if verdict else None,
                    "reason": verdict.reason if verdict else None,
                }
            )
    return {
        "diffalign": __version__,
        **common,
        "seed": request.facts["base_seed"],
        "count": len(request.jobs) // len(request.prompts),
        "batch": request.batch,
        "no_verdicts": why,
        "columns": [column_data(request.model, column) for column in columns],
        "images": images,
    }


def column_data(model: Model, column: Column) -> Json:
    """One column as JSON data."""
    report = column.report
    return {
        "label": column.label,
        "techniques": column.samples[0].settings["techniques"],
        "nfe": report.nfe,
        "seconds_per_image": report.seconds / max(report.images, 1),
        "effective_scale": column.scale(model),
        "guided_steps": column.guided_steps(model),
        "correct": sum(column.correct) if column.correct else None,
        "judged": len(column.correct),
        "report": report.to_dict(),
    }


def print_table(request: Request, columns: Sequence[Column]) -> None:
    """One line per column."""
    model = request.model
    with_verdicts = any(column.correct for column in columns)
    heads = ["column", "NFE/image", "guided steps", "effective scale", "s/image"]
    heads += ["correct"] if with_verdicts else []
    lines = []
    for column in columns:
        scale, report = column.scale(model), column.report
        line = [
            column.label,
            f"{report.nfe:.4g}",
            f"{column.guided_steps(model)} of {report.steps}",
            "-" if scale is None else f"{scale:.2f}",
            f"{report.seconds / max(report.images, 1):.3f}",
        ]
        if with_verdicts:
            line.append(f"{sum(column.correct)} of {len(column.correct)}")
        lines.append(line)
    title = (
        f"{model.name}: {len(columns[0].samples)} images per column, {model.steps} steps, "
        f"{model.scheduler}, {columns[0].samples[0].settings['device']}"
    )
    show.table(heads, lines, title, numbers=heads[1:])
