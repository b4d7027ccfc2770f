"""Draws the pictures of ``architecture.md``: ``python docs/pictures.py``."""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent
INK, QUIET, PAPER = "#26262a", "#6b6b73", "#ffffff"

# from the street up: (rooms of one level, what they hold)
LEVELS = (
    (("core", "kernels", "drawing", "tasks"), "contracts, fused maths, sheets, rules"),
    (("families",), "one file per model family"),
    (("seams",), "the only code that touches diffusers"),
    (("embedded",), "models that ship, their world and networks"),
    (("guidance", "attention", "pruning", "rewards"), "one file per technique or reward"),
    (("search", "noise_opt"), "one file per method of align"),
    (("generate", "alignment"), "the one sampling loop; the door of search"),
    (("calibration",), "fits a technique to a model"),
    (("eval",), "measures and compares"),
    (("app",), "the page"),
    (("cli",), "the command line, which starts the page too"),
)
COLOURS = (
    "#dfe8f6", "#d9ead8", "#fbe3c8", "#efe0f2", "#fff2b8", "#d6eef0", "#e7e7ec", "#f6dcdc",
    "#dfe8f6", "#d9ead8", "#fbe3c8",
)  # fmt: skip

STEP = (
    ("pipeline", "calls its denoiser", 0),
    ("seams/denoiser/tap.py", "which step is this? (clock)", 1),
    ("technique.passes", "names the evaluations it needs", 2),
    ("evaluate.py", "runs exactly those rows", 1),
    ("attention, blocks", "middleware inside the denoiser", 2),
    ("technique.combine", "forms the guided prediction g", 2),
    ("branches.py", "answers so that the pipeline gets g", 1),
    ("pipeline", "mixes, calls scheduler.step", 0),
    ("closed_loop.py", "what arrived equals g, or it raises", 1),
)
LANES = ("diffusers, unmodified", "seams", "techniques")


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colour,
            edgecolor=QUIET,
            linewidth=0.8,
        )
    )


def blank(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), dpi=110)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def rooms() -> None:
    """Levels from the ground up; a room may import those below its own level."""
    height = 0.58
    figure, axes = blank(8.0, height * len(LEVELS) + 0.5)
    for level, (names, text) in enumerate(LEVELS):
        y = 0.1 + height * level
        width = 4.4 / len(names) - 0.1
        for i, name in enumerate(names):
            x = 0.2 + i * (width + 0.1)
            box(axes, x, y, width, height - 0.12, COLOURS[level])
            axes.text(
                x + width / 2, y + 0.23, name, ha="center", va="center", color=INK, fontsize=10
            )
        axes.text(4.8, y + 0.23, text, va="center", color=QUIET, fontsize=9)
    axes.annotate(
        "",
        xy=(4.62, 0.2),
        xytext=(4.62, height * len(LEVELS)),
        arrowprops={"arrowstyle": "->", "color": QUIET, "lw": 1.2},
    )
    axes.text(
        0.2, height * len(LEVELS) + 0.25, "Rooms of diffalign/: imports point downwards",
        va="center", color=INK, fontsize=11, weight="bold",
    )  # fmt: skip
    figure.savefig(FOLDER / "rooms.png", facecolor=PAPER)
    plt.close(figure)


def guided_step() -> None:
    """One guided step, from the pipeline's call to the scheduler."""
    row, width = 0.66, 2.55
    total = row * len(STEP) + 0.55
    figure, axes = blank(8.2, total)
    for lane, name in enumerate(LANES):
        x = 0.1 + lane * 2.72
        axes.add_patch(
            plt.Rectangle((x - 0.03, 0.05), width + 0.06, total - 0.1, color=COLOURS[6], alpha=0.35)
        )
        axes.text(
            x + width / 2, total - 0.24, name, ha="center", va="center", weight="bold", color=INK,
            fontsize=10.5,
        )  # fmt: skip
    centre = []
    for i, (where, text, lane) in enumerate(STEP):
        x, y = 0.1 + lane * 2.72, total - 0.5 - row * (i + 1) + 0.08
        box(axes, x, y, width, row - 0.16, (COLOURS[0], COLOURS[2], COLOURS[4])[lane])
        lines = text.count("\n")
        axes.text(
            x + width / 2, y + 0.36 + 0.06 * lines, where, ha="center", va="center", color=INK,
            fontsize=8.8, family="monospace",
        )  # fmt: skip
        axes.text(
            x + width / 2, y + 0.15 + 0.02 * lines, text, ha="center", va="center", color=INK,
            fontsize=8 if not lines else 7.2, linespacing=0.95,
        )  # fmt: skip
        centre.append((x + width / 2, y, y + row - 0.16))
    for (x0, low, _), (x1, _, high) in pairwise(centre):
        axes.add_patch(
            FancyArrowPatch(
                (x0, low),
                (x1, high),
                arrowstyle="-|>",
                mutation_scale=9,
                color=QUIET,
                linewidth=1.0,
                shrinkA=0,
                shrinkB=0,
            )
        )
    figure.savefig(FOLDER / "guided-step.png", facecolor=PAPER)
    plt.close(figure)


if __name__ == "__main__":
    rooms()
    guided_step()
