"""Line charts as pictures, for reports, calibration and benchmarks. matplotlib draws them.

It is imported when the first chart is drawn, and without ``pyplot``: no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = (
    "#1f68c4",
    "#ce541a",
    "#248a52",
    "#8c46aa",
    "#be2850",
    "#5a5a5a",
    "#b48c14",
    "#008c96",
)
# line and dot of the first curves of all colours, and of those that come after
STYLES = (("solid", "o"), ("dashed", "s"), ("dotted", "^"))
INK, GRID = "#26262a", "#e2e2e6"
DPI = 100
# height of a name in the chart, in pixels
NAME_HEIGHT = 15
# a line through more points has no dots
DENSE = 40
# left, bottom, right and top in pixels
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points under one label of the legend, with an interval at each if there is one."""

    label: str
    # (x, y), joined in this order
    points: Sequence[tuple[float, float]]
    # lower and upper end of the interval at each point; none, or as many as points
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    # a text beside each point; none, or as many as points
    names: Sequence[str] = ()
    # the points are joined
    line: bool = True
    # the interval is a shaded band instead of bars
    band: bool = False
    # it is read on the right-hand axis
    right: bool = False

    @property
    def values(self) -> list[float]:
        """Every y that must lie inside the axis."""
        return [*(y for _, y in self.points), *self.low, *self.high]


def limits(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows ``values`` with some room.

    Values that differ by less than a thousandth of their size are one value to a reader: the axis
    then covers a tenth of that size on either side of it, or -1 to 1 around 0. An axis of values
    that are never negative starts at 0 or above.
    """
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.04 if high > 1.001 * low else 2.0
        return low / room, high * room
    size = max(abs(low), abs(high))
    room = 0.05 * (high - low) if high - low > 1e-3 * size else 0.1 * size or 1.0
    return (max(0.0, low - room) if low >= 0.0 < size else low - room), high + room


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    right_label: str = "",
    log: Literal["", "x", "y", "xy"] = "",
    size: tuple[int, int] = (900, 480),
) -> Image.Image:
    """``curves`` over a shared x, as an RGB picture of ``size`` pixels.

    ``log`` makes the x axis, the left axis or both logarithmic.

    Raises: ValueError without points, or for a value at or below 0 on a logarithmic axis.
    """
    from matplotlib.figure import Figure

    curves = [curve for curve in curves if curve.points]
    if not curves:
        raise ValueError("line_chart(curves=...) must hold at least one curve with points.")
    inches = (size[0] / DPI, size[1] / DPI)
    figure = Figure(figsize=inches, dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    main = figure.subplots()
    axes = {False: main}
    if any(curve.right for curve in curves):
        axes[True] = main.twinx()
    for side, ax in axes.items():
        _frame(ax, grid=not side)
        ax.set_ylabel(right_label if side else y_label, color=INK)
        values = [y for curve in curves if curve.right is side for y in curve.values]
        if values:
            ax.set_ylim(*_scaled(ax.yaxis, values, "y" in log and not side))
    main.set_xlabel(x_label, color=INK)
    xs = [x for curve in curves for x, _ in curve.points]
    main.set_xlim(*_scaled(main.xaxis, xs, "x" in log))
    for i, curve in enumerate(curves):
        again, colour = divmod(i, len(COLOURS))
        _draw(axes[curve.right], curve, COLOURS[colour], *STYLES[again % len(STYLES)])
    _legend(figure, main, axes, curves)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, color=INK)
    _write_names(figure, axes, curves)
    return _picture(figure)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    page = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page


def _frame(ax: Axes, grid: bool) -> None:
    ax.tick_params(color=GRID, labelcolor=INK, labelsize=9.5, length=3)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(INK)
    if grid:
        ax.grid(True, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)


def _scaled(axis: Axis, values: Sequence[float], log: bool) -> tuple[float, float]:
    """Round ticks without an offset for the axis; returns its ends."""
    from matplotlib.axis import XAxis
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    flat = isinstance(axis, XAxis)
    steps = [1, 2, 5, 10] if flat else [1, 2, 2.5, 5, 10]

    if log and min(values) <= 0.0:
        raise ValueError(
            f"line_chart(log=...) shows values above 0 only; the smallest is {min(values):g}. "
            "Leave them out or use a linear axis."
        )
    if log:
        axis._set_axes_scale("log")  # type: ignore[attr-defined]
        few = max(values) < 10 * min(values)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5) if few else (1, 2, 3, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        whole = flat and all(float(x).is_integer() for x in values)
        axis.set_major_locator(MaxNLocator(nbins=9, steps=steps, integer=whole))
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axis.set_major_formatter(plain)
    if flat and not log:
        room = 0.03 * (max(values) - min(values)) or 1.0
        return min(values) - room, max(values) + room
    return limits(values, log=log)


def _draw(ax: Axes, curve: Curve, colour: str, style: str, dot: str) -> None:
    xs, ys = zip(*curve.points, strict=True)
    joined = curve.line and len(xs) > 1
    style = style if joined else "none"
    dot = "" if joined and len(xs) > DENSE else dot
    ax.plot(xs, ys, color=colour, linestyle=style, linewidth=2, marker=dot, markersize=4.5)
    if curve.low and curve.band:
        ax.fill_between(xs, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    elif curve.low:
        ax.vlines(xs, curve.low, curve.high, color=colour, linewidth=1.2)


def _legend(figure: Figure, place: Axes, axes: dict[bool, Axes], curves: Sequence[Curve]) -> None:
    """Above the frame, in as many columns as fit."""
    lines = {side: iter(ax.lines) for side, ax in axes.items()}
    handles = [next(lines[curve.right]) for curve in curves]
    labels = [curve.label + (" (right axis)" if curve.right else "") for curve in curves]
    columns = int(figure.bbox.width / (7 * max(map(len, labels)) + 70))
    place.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        ncols=max(1, min(columns, len(labels))),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )


def _write_names(figure: Figure, axes: dict[bool, Axes], curves: Sequence[Curve]) -> None:
    """Write each name near its point where it covers no point, no line and no other name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not any(curve.names for curve in curves):
        return
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places in pixels hold for this layout only
    frame = axes[False].get_window_extent()
    page = figure.bbox
    spots = [axes[c.right].transData.transform(c.points).tolist() for c in curves]
    taken = [box for c, spot in zip(curves, spots, strict=True) for box in _covered(spot, c.line)]
    names = [
        (x, y, name, COLOURS[i % len(COLOURS)])
        for i, (curve, spot) in enumerate(zip(curves, spots, strict=True))
        for (x, y), name in zip(spot, curve.names)
    ]
    for x, y, name, colour in sorted(names, key=lambda item: (-item[1], item[0])):
        text = figure.text(0, 0, name, color=colour, fontsize=9.5, va="center")
        width = text.get_window_extent(renderer).width
        boxes = [
            box
            for box in _places(x, y, width, NAME_HEIGHT)
            if frame.x0 <= box[0]
            and box[2] <= page.x1
            and frame.y0 <= box[1]
            and box[3] <= frame.y1
        ]
        free = (box for box in boxes if not any(_overlap(box, other) for other in taken))
        box = next(free, boxes[0])
        taken.append(box)
        text.set_position((box[0] / page.width, (box[1] + box[3]) / 2 / page.height))
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(near, (x, y)) > 10:
            ends = [
                [x / page.width, near[0] / page.width],
                [y / page.height, near[1] / page.height],
            ]
            figure.lines.append(_thread(figure, ends, colour))


def _thread(figure: Figure, ends: list[list[float]], colour: str) -> Line2D:
    from matplotlib.lines import Line2D

    line = Line2D(*ends, color=colour, linewidth=0.7, alpha=0.7, transform=figure.transFigure)
    line.set_figure(figure)
    return line


def _covered(spots: Sequence[Sequence[float]], line: bool) -> Iterator[Box]:
    """What the points, and the line between them, cover."""
    for x, y in spots:
        yield x - 4, y - 4, x + 4, y + 4
    for (x1, y1), (x2, y2) in pairwise(spots) if line else ():
        count = int(math.dist((x1, y1), (x2, y2)) / 4)
        for i in range(1, count):
            x, y = x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count
            yield x - 1, y - 1, x + 1, y + 1


def _places(x: float, y: float, width: float, height: float) -> list[Box]:
    """Boxes of a name that may stand beside a point, nearest first."""
    columns = [
        side * dx - (width if side < 0 else 0) for dx in (7, 30, 60, 100) for side in (1, -1)
    ]
    rows = [sign * step * height / 3 for step in range(40) for sign in (1, -1)]
    boxes = [
        (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
        for dx in columns
        for dy in rows
    ]
    return sorted(
        boxes,
        key=lambda box: math.dist((min(max(x, box[0]), box[2]), (box[1] + box[3]) / 2), (x, y)),
    )


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _picture(figure: Figure) -> Image.Image:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels).convert("RGB")
