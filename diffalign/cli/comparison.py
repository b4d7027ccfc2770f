"""Every column of a request on the same noise: images, costs and verdicts, as a contact sheet and
as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign import Report, __version__
from diffalign.cli import run, show
from diffalign.cli.referee import referee
from diffalign.cli.request import Column, Request
from diffalign.drawing.png import save_png
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.tasks.geneval.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Result:
    """One column: an image and a verdict (None without one) per job, the settings and the report of
    all its batches."""

    column: Column
    files: tuple[Path, ...]
    images: tuple[Image.Image, ...]
    verdicts: tuple[Verdict | None, ...]
    config: dict[str, Any]
    report: Report

    @property
    def judged(self) -> list[bool]:
        """Right or wrong, for the images that have a verdict."""
        return [v.correct for v in self.verdicts if v is not None]

    def effective(self, request: Request) -> float | None:
        """Mean effective scale over the guided steps; without a guidance of ours the pipeline's own
        scale."""
        if not any(t.kind == "guidance" for t in self.column.techniques):
            return request.model.scale(request.scale)
        known = [value for value in self.report.scale if value is not None]
        return sum(known) / len(known) if known else None

    def guided(self, request: Request) -> int:
        """Steps that guided at least one image."""
        if any(t.kind == "guidance" for t in self.column.techniques):
            return self.report.guided_steps
        return self.report.steps if request.model.scale(request.scale) != 1.0 else 0


def compare(request: Request, quiet: bool) -> tuple[list[Result], str]:
    """Run every column and save each image as soon as its batch is done.

    Also returns why there are no verdicts, "" if there are.
    """
    todo = run.jobs(request)
    judge, why = referee(request.model, request.prompts)
    folder = request.output / "images"
    folder.mkdir(exist_ok=True)
    results: list[Result] = []
    kept = 0
    try:
        with show.progress(
            len(request.columns) * -(-len(todo) // request.batch) * request.steps, quiet
        ) as bar:
            run.warm_up(request)
            for number, column in enumerate(request.columns):
                parts, files = [], []
                verdicts: list[Verdict | None] = []
                for made in run.batches(request, column, bar(column.label) if bar else None):
                    for job, image in zip(made.jobs, made.images):
                        files.append(folder / f"{number:02d}-{run.file_name(request, job)}")
                        save_png(image, files[-1], run.settings(request, job, made.config))
                        kept += 1
                    prompts = [job.prompt for job in made.jobs]
                    verdicts += (
                        judge.judge(prompts, made.images) if judge else [None] * len(prompts)
                    )
                    parts.append(made)
                images = tuple(image for made in parts for image in made.images)
                report = run.merged([made.report for made in parts])
                results.append(
                    Result(column, tuple(files), images, tuple(verdicts), parts[0].config, report)
                )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{kept} of {len(request.columns) * len(todo)} images are kept in {folder}"
        ) from None
    return results, why


def sheet(request: Request, results: Sequence[Result], title: str = "") -> Image.Image:
    """Prompts down, columns across, each with its cost; frames and reasons where there are
    verdicts."""
    todo = run.jobs(request)

    def cell(result: Result, i: int) -> Cell:
        seen = result.verdicts[i]
        return Cell(
            result.images[i],
            caption=seen.reason if seen else "",
            correct=seen.correct if seen else None,
        )

    rows = [
        request.prompts[job.prompt] + (f"\nseed {job.seed}" if request.count > 1 else "")
        for job in todo
    ]
    columns = [
        f"{result.column.label}\n{result.report.nfe:.4g} NFE per image" for result in results
    ]
    footer = (
        f"{request.model.name}, {request.scheduler}, {request.steps} steps, seed {request.seed}; "
        "the same noise in every column"
    )
    return contact_sheet(
        [[cell(r, i) for r in results] for i in range(len(todo))],
        rows,
        columns,
        title=title,
        footer=footer,
    )


def data(request: Request, results: Sequence[Result], why: str) -> dict[str, Any]:
    """The comparison as JSON data."""
    todo = run.jobs(request)
    common = run.settings(request, todo[0], {})
    for name in ("prompt", "seed"):
        del common[name]
    columns, images = [], []
    for result in results:
        columns.append(
            {
                "label": result.column.label,
                "techniques": result.config["techniques"],
                "nfe": result.report.nfe,
                "seconds_per_image": result.report.seconds / max(result.report.images, 1),
                "effective_scale": result.effective(request),
                "guided_steps": result.guided(request),
                "correct": sum(result.judged) if result.judged else None,
                "judged": len(result.judged),
                "report": result.report.to_dict(),
            }
        )
        for job, path, seen in zip(todo, result.files, result.verdicts):
            right, reason = (seen.correct, seen.reason) if seen else (None, None)
            entry = {
                "column": result.column.label,
                "prompt": request.prompts[job.prompt],
                "seed": job.seed,
                "file": str(path),
            }
            images.append({**entry, "correct": right, "reason": reason})
    head = {
        "diffalign": __version__,
        **common,
        "seed": request.seed,
        "count": request.count,
        "batch": request.batch,
        "no_verdicts": why,
    }
    return {**head, "columns": columns, "images": images}


def print_table(request: Request, results: Sequence[Result]) -> None:
    """One line per column."""
    judged = any(result.judged for result in results)
    heads = [
        "column",
        "NFE/image",
        "guided steps",
        "effective scale",
        "s/image",
        *(["correct"] if judged else []),
    ]
    lines = []
    for result in results:
        scale = result.effective(request)
        report = result.report
        line = [
            result.column.label,
            f"{report.nfe:.4g}",
            f"{result.guided(request)} of {report.steps}",
        ]
        line += [
            "-" if scale is None else f"{scale:.2f}",
            f"{report.seconds / max(report.images, 1):.3f}",
        ]
        lines.append(line + ([f"{sum(result.judged)} of {len(result.judged)}"] if judged else []))
    title = (
        f"{request.model.name}: {len(run.jobs(request))} images per column, {request.steps} "
        f"steps, {request.scheduler}, {request.device}"
    )
    show.table(heads, lines, title, numbers=heads[1:])
