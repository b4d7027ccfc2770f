"""What people look at after a run: before and after, the best images, the curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffalign.drawing.charts import Curve, line_chart
from diffalign.drawing.sheet import Cell, contact_sheet

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.alignment.result import Result


def _cell(image: Tensor, caption: str) -> Cell:
    from diffalign.alignment.result import picture

    return Cell(picture(image if image.ndim == 3 else image[0]), caption)


def before_after(result: Result) -> Image.Image:
    """The first image of the run beside the result, with scores."""
    lines = [f"score {result.first.score:.3f}", f"score {result.score:.3f}"]
    for name, pair in result.judges.items():
        lines = [f"{line}\n{name} {value:.3f}" for line, value in zip(lines, pair)]
    cells = [_cell(result.first.image, lines[0]), _cell(result.tensor, lines[1])]
    columns = ("one sample", f"best of {result.ledger.nfe} NFE")
    return contact_sheet([cells], columns=columns, title=result.prompt)


def best_images(result: Result) -> Image.Image:
    """The best candidates, best first, in rows of four."""
    cells: list[Cell | None] = [_cell(c.image, f"{c.score:.3f}") for c in result.top]
    width = min(4, len(cells))
    cells += [None] * (-len(cells) % width)
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return contact_sheet(rows, title=f"The best of {result.scored}: {result.prompt}")


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
