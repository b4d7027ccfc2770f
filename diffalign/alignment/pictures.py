"""What people look at after a run: before and after, the best images, the curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffalign.drawing.charts import Curve, line_chart
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.drawing.video import evenly

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.alignment.result import Result


def _cell(image: Tensor, caption: str) -> Cell:
    from diffalign.alignment.result import picture

    return Cell(picture(image if image.ndim == 3 else image[0]), caption)


FRAMES = 6
"""Frames of a video in a row of a sheet."""


def _row(video: Tensor, most: int = FRAMES) -> list[Cell | None]:
    """Frames [T, 3, H, W] of a video with their numbers."""
    return [_cell(video[i], f"frame {i + 1}") for i in evenly(len(video), most)]


def frame_sheet(result: Result) -> Image.Image:
    """At most 24 frames of a video, evenly spread, in rows of six."""
    cells = _row(result.tensor, 4 * FRAMES)
    width = min(FRAMES, len(cells))
    cells += [None] * (-len(cells) % width)
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return contact_sheet(rows, title=result.prompt, footer=f"{len(result.tensor)} frames")


def before_after(result: Result) -> Image.Image:
    """The first image, or video, of the run beside the result, with scores."""
    lines = [f"score {result.first.score:.3f}", f"score {result.score:.3f}"]
    for name, pair in result.judges.items():
        lines = [f"{line}\n{name} {value:.3f}" for line, value in zip(lines, pair)]
    columns = ("one sample", f"best of {result.ledger.nfe} NFE")
    if result.tensor.ndim == 4:
        heads = ("the first whole video", columns[1])
        rows = [f"{head}\n{line}" for head, line in zip(heads, lines)]
        videos = [_row(result.first.image), _row(result.tensor)]
        return contact_sheet(videos, rows=rows, title=result.prompt)
    cells = [_cell(result.first.image, lines[0]), _cell(result.tensor, lines[1])]
    return contact_sheet([cells], columns=columns, title=result.prompt)


def best_images(result: Result) -> Image.Image:
    """The best candidates, best first, in rows of four; of videos a row each."""
    title = f"The best of {result.scored}: {result.prompt}"
    if result.tensor.ndim == 4:
        scores = [f"{c.score:.3f}" for c in result.top]
        return contact_sheet([_row(c.image) for c in result.top], rows=scores, title=title)
    cells: list[Cell | None] = [_cell(c.image, f"{c.score:.3f}") for c in result.top]
    width = min(4, len(cells))
    cells += [None] * (-len(cells) % width)
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return contact_sheet(rows, title=title)


def curve(result: Result) -> Image.Image:
    """The best score against NFE, as steps."""
    points: list[tuple[float, float]] = []
    for moment in result.history:
        if points:
            points.append((moment.nfe, points[-1][1]))
        points.append((moment.nfe, moment.score))
    points.append((max(result.ledger.nfe, points[-1][0]), points[-1][1]))
    return line_chart(
        [Curve("best score", points)],
        title=result.prompt,
        x_label="NFE (denoiser rows)",
        y_label=str(result.settings.get("reward", "score")),
    )
