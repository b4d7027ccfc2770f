"""Bars with intervals, and points of score against cost, as pictures. matplotlib draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from diffalign.drawing.charts import COLOURS, DPI, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Series:
    """Bars of one colour."""

    label: str
    # one for each group
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, slots=True)
class Point:
    """One run in a chart of score against cost."""

    label: str
    cost: float
    score: float
    low: float
    high: float


def bar_chart(groups: Sequence[str], series: Sequence[Series], title: str) -> bytes:
    """A PNG of bars in [0, 1], ``groups`` side by side, with the interval of each."""
    figure, ax = _axes(max(7.0, 1.35 * len(groups) * max(1.0, 0.35 * len(series))), 3.4)
    width = 0.8 / len(series)
    for number, one in enumerate(series):
        places = [i - 0.4 + width * (number + 0.5) for i in range(len(groups))]
        down = [max(0.0, v - low) for v, low in zip(one.values, one.low)]
        up = [max(0.0, high - v) for v, high in zip(one.values, one.high)]
        colour = COLOURS[number % len(COLOURS)]
        ax.bar(places, one.values, width * 0.92, color=colour, label=_plain(one.label))
        ax.errorbar(places, one.values, [down, up], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    ax.set_xticks(range(len(groups)), [_plain(group) for group in groups])
    ax.set_ylim(0, 1)
    ax.set_title(_plain(title), loc="left", fontsize=11)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def cost_chart(points: Sequence[Point], unit: str) -> bytes:
    """A PNG of scores against what an image costs in ``unit``, with intervals."""
    figure, ax = _axes(5.2, 3.4)
    for number, point in enumerate(points):
        error = [[max(0.0, point.score - point.low)], [max(0.0, point.high - point.score)]]
        colour = COLOURS[number % len(COLOURS)]
        label = _plain(point.label)
        ax.errorbar([point.cost], [point.score], error, fmt="o", color=colour, label=label)
    ax.set_xlim(left=0, right=1.15 * max((point.cost for point in points), default=1.0) or 1.0)
    ax.set_xlabel(f"{unit} of an image")
    ax.set_ylabel("score")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    ax = figure.add_subplot()
    ax.grid(axis="y", color=GRID)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure, ax


def _plain(text: str) -> str:
    """``text`` so that matplotlib shows it as it is, shortened."""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
