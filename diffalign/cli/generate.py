"""``diffalign generate``: images from prompts, with techniques."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, command, complain
from diffalign.cli.request import prepare, techniques_of

if TYPE_CHECKING:
    from diffalign.seams import Report


@command
@arguments.shared(output=Path("outputs/generate"))
def generate(
    options: arguments.Options,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot",
            help="Also draw the effective scale per step (scale.png).",
            rich_help_panel=arguments.WHERE,
        ),
    ] = False,
) -> None:
    """Make images. Several --technique act together; every PNG carries its settings."""
    techniques = techniques_of(options.technique)
    if plot and not any(technique.seam == "denoiser" for technique in techniques):
        raise BadInput("--plot draws what a guidance did; add one, for example --technique cfg.")
    from diffalign.drawing.png import save_png
    from diffalign.generate.samples import merged, picture, samples

    request = prepare(options, techniques)
    model, output = request.model, request.output
    images, reports = [], []
    output.mkdir(parents=True, exist_ok=True)
    try:
        with show.progress(request.calls * model.steps, options.quiet) as bar:
            for batch in samples(
                model.pipe,
                techniques,
                request.jobs,
                batch=request.batch,
                call=model.call,
                facts=request.facts,
                step=bar("+".join(options.technique or []) or "plain"),
            ):
                for sample in batch:
                    path = output / f"{sample.job.key}.png"
                    save_png(picture(sample.image), path, sample.settings)
                    images.append(
                        {"file": str(path), "prompt": sample.job.prompt, "seed": sample.job.seed}
                    )
                reports.append(batch[0].report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(images)} of {len(request.jobs)} images are kept in {output}"
        ) from None
    say(options, images, merged(reports), output / "scale.png" if plot else None)


def say(
    options: arguments.Options,
    images: Sequence[Mapping[str, object]],
    report: Report,
    drawing: Path | None,
) -> None:
    """Print what was made, and draw the plot where one is to be ``drawing``."""
    if drawing is not None:
        try:
            report.plot(drawing)
        except ValueError as error:  # for example a scale of 1: no step had two branches
            complain(error, "warning")
            drawing = None
    if options.json:
        name = None if drawing is None else str(drawing)
        show.text(show.to_json({"images": images, "plot": name, "report": report.to_dict()}))
    elif not options.quiet:
        show.text(report)
        for image in images:
            show.text(image["file"])
        if drawing is not None:
            show.text(drawing)
