"""``diffalign generate``: images from prompts, with techniques."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign.cli import arguments as a
from diffalign.cli import show
from diffalign.cli.options import Options
from diffalign.cli.problem import BadInput, checking, command, complain


def techniques_of(texts: list[str] | None) -> tuple[Any, ...]:
    """Techniques of repeated ``--technique`` options, all together."""
    from diffalign.core.registry import parse

    with checking():
        return tuple(made for text in texts or [] for made in parse(text))


@command
@a.shared(output=Path("outputs/generate"))
def generate(
    options: Options,
    technique: a.Technique = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw the effective scale per step (scale.png).")
    ] = False,
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """Make images. Several --technique act together; every PNG carries its settings."""
    techniques = techniques_of(technique)
    if plot and not any(t.kind == "guidance" for t in techniques):
        raise BadInput("--plot draws what a guidance did; add one, for example --technique cfg.")
    from diffalign.cli import run
    from diffalign.cli.request import Column, prepare
    from diffalign.drawing.png import save_png

    column = Column("+".join(technique or []) or "plain", techniques)
    request = prepare(options, (column,))
    todo, files, reports = run.jobs(request), [], []
    try:
        with show.progress(-(-len(todo) // request.batch) * request.steps, quiet) as bar:
            for made in run.batches(request, column, bar(column.label) if bar else None):
                for job, image in zip(made.jobs, made.images):
                    path = request.output / run.file_name(request, job)
                    save_png(image, path, run.settings(request, job, made.config))
                    files.append((job, path))
                reports.append(made.report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(files)} of {len(todo)} images are kept in {request.output}"
        ) from None
    report = run.merged(reports)
    if plot:
        try:
            report.plot(request.output / "scale.png")
        except ValueError as error:  # for example a scale of 1: no step had two branches
            complain(error, "warning")
            plot = False
    if json:
        images = [
            {"file": str(path), "prompt": request.prompts[job.prompt], "seed": job.seed}
            for job, path in files
        ]
        drawn = str(request.output / "scale.png") if plot else None
        show.text(show.to_json({"images": images, "plot": drawn, "report": report.to_dict()}))
    elif not quiet:
        show.text(report)
        for _, path in files:
            show.text(path)
        if plot:
            show.text(request.output / "scale.png")
