"""A line chart drawn with Pillow alone, for reports: no plotting library in the base install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, GRID, PAPER = (38, 38, 42), (226, 226, 230), (255, 255, 255)
COLOURS = (
    (31, 104, 196),
    (206, 84, 26),
    (36, 138, 82),
    (140, 70, 170),
    (190, 40, 80),
    (90, 90, 90),
    (180, 140, 20),
    (0, 140, 150),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """``points`` (x, y) joined by lines.

    ``right``: read on the right-hand axis. ``low``, ``high``: interval ends.
    """

    label: str
    points: Sequence[tuple[float, float]]
    right: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    line: bool = True


def ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Round numbers that cover [lo, hi]."""
    span = max(hi - lo, 1e-12)
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.floor(lo / step + 1e-9)
    values: list[float] = []
    while (first + len(values) - 1) * step < hi - 1e-9 * span:
        values.append((first + len(values)) * step)
    return values


def chart(
    curves: Sequence[Curve],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    size: tuple[int, int] = (900, 480),
    names: bool = False,
) -> Image.Image:
    """Curves over shared x, up to two y axes.

    ``names`` writes each curve's label beside its last point instead of in the legend only.
    """
    width, height = size
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    sides = [side for side in (False, True) if any(c.right is side and c.points for c in curves)]
    if not sides:
        raise ValueError("chart needs at least one curve with points.")
    left, right, top, bottom = 72, width - (72 if True in sides else 24), 78, height - 54
    xs = [x for c in curves for x, _ in c.points]
    x_ticks = ticks(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    x0, x1 = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])

    def px(x: float) -> float:
        return left + (x - x0) / max(x1 - x0, 1e-12) * (right - left)

    scales: dict[bool, tuple[float, float]] = {}
    for side in sides:
        ys = [
            y
            for c in curves
            if c.right is side
            for y in (*(p[1] for p in c.points), *c.low, *c.high)
        ]
        pad = max(max(ys) - min(ys), abs(max(ys)) * 1e-3, 1e-9) * 0.05
        low = (
            min(ys) - pad if min(ys) < 0 else max(0.0, min(ys) - pad)
        )  # shares and costs have no negative ticks
        marks = ticks(low, max(ys) + pad)
        scales[side] = (marks[0], marks[-1])
        digits = max(
            0,
            math.ceil(-math.log10(max(marks[1] - marks[0], 1e-12)) - 1e-9)
            + (1 if f"{marks[1] - marks[0]:.1e}"[:3] == "2.5" else 0),
        )
        for mark in marks:
            y = bottom - (mark - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)
            if side is sides[0]:
                draw.line((left, y, right, y), fill=GRID)
            draw.text(
                (right + 8, y) if side else (left - 8, y),
                f"{mark:.{digits}f}",
                fill=INK,
                font=small,
                anchor="lm" if side else "rm",
            )
    for mark in x_ticks:
        draw.text((px(mark), bottom + 8), f"{mark:g}", fill=INK, font=small, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=INK)
    draw.text((left, 14), title, fill=INK, font=font)
    draw.text(((left + right) / 2, height - 10), x_label, fill=INK, font=small, anchor="mb")
    draw.text((8, top - 22), y_label, fill=INK, font=small)
    legend, line = float(left), 49
    labels: list[tuple[float, float, str, tuple[int, int, int]]] = []
    taken: list[tuple[float, float, float, float]] = []
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        lo, hi = scales.get(curve.right, (0.0, 1.0))

        def py(y: float, lo: float = lo, hi: float = hi) -> float:
            return bottom - (y - lo) / (hi - lo) * (bottom - top)

        path = [(px(x), py(y)) for x, y in curve.points]
        for (x, _), a, b in zip(path, curve.low, curve.high):
            draw.line((x, py(a), x, py(b)), fill=colour, width=1)
        if len(path) > 1 and curve.line:
            draw.line(path, fill=colour, width=3, joint="curve")
        for x, y in path:
            taken.append((x - 3.5, y - 3.5, x + 3.5, y + 3.5))
            draw.ellipse(taken[-1], fill=colour)
        if names and path:
            labels.append((*path[-1], curve.label, colour))
        else:
            text = curve.label + (" (right)" if curve.right else "")
            wide = 36 + draw.textlength(text, font=small)
            if legend + wide > width and legend > left:
                legend, line = float(left), line + 17
            draw.rectangle((legend, line - 5, legend + 14, line + 5), fill=colour)
            draw.text((legend + 20, line), text, fill=INK, font=small, anchor="lm")
            legend += wide
    for x, y, text, colour in sorted(labels, key=lambda item: (item[1], item[0])):
        wide, high = draw.textlength(text, font=small), 15.0
        boxes = [(cx, cy, cx + wide, cy + high) for cx, cy in _places(x, y, wide, high)]
        inside = [
            box
            for box in boxes
            if box[0] >= 4 and box[2] <= width - 4 and box[1] >= top - 24 and box[3] <= bottom
        ]
        box = next(
            (b for b in inside if not any(_overlap(b, other) for other in taken)),
            (inside or boxes)[0],
        )
        taken.append(box)
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(near, (x, y)) > 10:
            draw.line((x, y, *near), fill=colour, width=1)
        draw.text((box[0], (box[1] + box[3]) / 2), text, fill=colour, font=small, anchor="lm")
    return image


def _places(x: float, y: float, wide: float, high: float) -> list[tuple[float, float]]:
    """Upper left corners where a label of that size may stand beside a point, nearest first."""
    rows = [step * sign * high * 0.5 for step in range(40) for sign in (-1, 1)]
    columns = (7.0, -7.0 - wide, 30.0, -30.0 - wide, 70.0, -70.0 - wide)
    found = [(x + dx, y - high / 2 + dy) for dx in columns for dy in rows]
    return sorted(
        found,
        key=lambda at: math.dist((min(max(x, at[0]), at[0] + wide), at[1] + high / 2), (x, y)),
    )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
