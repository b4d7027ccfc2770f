"""Pictures of a tree search: states from noise to images, with values and small images.

matplotlib draws; it is imported when the first tree is drawn, without ``pyplot``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.drawing.charts import DPI, GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from diffalign.core.search import Tree

# images in one picture
MOST = 32
# height of an image and its row, width of the page, in pixels
SIDE, ROW, WIDTH = 44, 52, 1000
BEST = "#ce541a"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every node that is shown stands."""

    # node -> row, counted from the top; a state stands in the middle of its children
    rows: dict[int, float]
    # the finished images that are shown, from the top
    leaves: tuple[int, ...]
    # evaluations from noise to image
    count: int


def layout(tree: Tree, most: int = MOST) -> Layout:
    """Rows of the ``most`` best images and of the states above them, best branches first.

    Raises: ValueError for a tree without a finished image.
    """
    nodes = tree.nodes
    finished = [i for i, node in enumerate(nodes) if node.image is not None]
    if not finished:
        raise ValueError("The tree has no finished image yet; draw it after its first round.")
    ranked = sorted(finished, key=lambda i: -nodes[i].value)[:most]
    shown: set[int] = set()
    for leaf in ranked:
        index: int | None = leaf
        while index is not None and index not in shown:
            shown.add(index)
            index = nodes[index].parent
    below: dict[int, list[int]] = {}
    highest: dict[int, float] = {}
    for index in sorted(shown, reverse=True):  # parents stand before their children
        node = nodes[index]
        highest[index] = max(
            highest.get(index, -math.inf), node.value if node.image is not None else -math.inf
        )
        if node.parent is not None:
            below.setdefault(node.parent, []).append(index)
            highest[node.parent] = max(highest.get(node.parent, -math.inf), highest[index])
    order: list[int] = []
    todo = [min(shown)]
    while todo:
        index = todo.pop()
        order.append(index)
        todo += sorted(below.get(index, []), key=lambda i: highest[i])
    leaves = tuple(i for i in order if nodes[i].image is not None)
    rows = {leaf: float(row) for row, leaf in enumerate(leaves)}
    for index in reversed(order):
        if index not in rows:
            places = [rows[child] for child in below[index]]
            rows[index] = (min(places) + max(places)) / 2
    return Layout(rows, leaves, max(nodes[leaf].step for leaf in leaves))


def tree_figure(tree: Tree, title: str = "", most: int = MOST) -> Figure:
    """The tree from left (noise) to right (images), the path to the best one in orange.

    A dot's colour is its value, its size the visits. At most ``most`` images are shown, the best
    ones.
    Raises: ValueError for a tree without a finished image.
    """
    from matplotlib.figure import Figure

    places = layout(tree, most)
    height = ROW * max(len(places.leaves), 4) + 124
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    left, top = 0.045, 70 / height
    ax = figure.add_axes((left, 58 / height, 0.80 - left, 1 - top - 58 / height))
    _draw_edges(ax, tree, places)
    _draw_nodes(figure, ax, tree, places)
    _draw_images(figure, ax, tree, places)
    total = sum(node.image is not None for node in tree.nodes)
    noun = "images" if tree.unit == "evaluations" else "branches"
    note = (
        f"{total} {noun}"
        if total == len(places.leaves)
        else f"best {len(places.leaves)} of {total} {noun}"
    )
    figure.text(left, 1 - 22 / height, title or "Search tree", color=INK, fontsize=12, va="center")
    figure.text(
        left,
        1 - 46 / height,
        f"{note}, {len(tree.nodes)} states; dots: colour is value, size is visits",
        color=INK,
        fontsize=9.5,
        va="center",
    )
    return figure


def _draw_edges(ax: Axes, tree: Tree, places: Layout) -> None:
    best = set(tree.best)
    for index, row in places.rows.items():
        node = tree.nodes[index]
        if node.parent is None:
            continue
        above = tree.nodes[node.parent]
        bright = index in best and node.parent in best
        ax.plot(
            [above.step, node.step],
            [places.rows[node.parent], row],
            color=BEST if bright else "#b8b8c0",
            linewidth=2.4 if bright else 1.0,
            zorder=2 if bright else 1,
            solid_capstyle="round",
        )


def _draw_nodes(figure: Figure, ax: Axes, tree: Tree, places: Layout) -> None:
    nodes = [tree.nodes[index] for index in places.rows]
    values = [node.value for node in nodes]
    dots = ax.scatter(
        [node.step for node in nodes],
        list(places.rows.values()),
        c=values,
        s=[18 + 14 * math.log2(1 + node.visits) for node in nodes],
        cmap="viridis",
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )
    ax.set_xlim(-0.03 * places.count, 1.03 * places.count)
    ax.set_ylim(max(len(places.leaves), 4) - 0.4, -0.6)
    ax.set_yticks([])
    ax.set_xticks(sorted({node.step for node in tree.nodes}))
    ends = "noise on the left, images on the right"
    if tree.unit != "evaluations":
        ends = "the last frame of each branch on the right"
    ax.set_xlabel(f"{tree.unit} ({ends})", color=INK)
    ax.tick_params(color=GRID, labelcolor=INK, labelsize=9.5, length=3)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(INK)
    height = figure.bbox.height
    bar = figure.add_axes((0.74, 1 - 38 / height, 0.2, 9 / height))
    colours = figure.colorbar(dots, cax=bar, orientation="horizontal")
    colours.outline.set_visible(False)  # type: ignore[operator]
    bar.tick_params(color=GRID, labelcolor=INK, labelsize=8.5, length=2)


def _draw_images(figure: Figure, ax: Axes, tree: Tree, places: Layout) -> None:
    """An image of at most ``SIDE`` pixels on the right of each leaf, and its score."""
    best = tree.best[-1] if tree.best else -1
    page, scale = figure.bbox, SIDE
    for leaf, row in zip(places.leaves, map(float, range(len(places.leaves)))):
        node = tree.nodes[leaf]
        picture = tree.images[node.image or 0].permute(1, 2, 0).float().clamp(0, 1).numpy()
        ratio = picture.shape[1] / picture.shape[0]
        width, height = (scale, scale / ratio) if ratio >= 1 else (scale * ratio, scale)
        _, middle = ax.transData.transform((0, row))
        box = figure.add_axes(
            (
                0.812 + (scale - width) / 2 / page.width,
                (middle - height / 2) / page.height,
                width / page.width,
                height / page.height,
            )
        )
        box.imshow(picture, aspect="auto", interpolation="nearest")
        box.set_xticks([])
        box.set_yticks([])
        for spine in box.spines.values():
            spine.set_visible(leaf == best)
            spine.set_color(BEST)
            spine.set_linewidth(2.5)
        figure.text(
            0.812 + (scale + 10) / page.width,
            middle / page.height,
            f"{node.value:.3f}",
            color=BEST if leaf == best else INK,
            fontsize=10,
            va="center",
            weight="bold" if leaf == best else "normal",
        )


def tree_picture(tree: Tree, title: str = "", most: int = MOST) -> Image.Image:
    """The tree as an RGB picture; see ``tree_figure``."""
    from PIL import Image

    stream = io.BytesIO()
    tree_figure(tree, title, most).savefig(stream, format="png", dpi=DPI)
    return Image.open(stream).convert("RGB")


def tree_svg(tree: Tree, title: str = "", most: int = MOST) -> str:
    """The tree as an SVG file, images inside it and text as text; equal trees give equal files."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "diffalign"}):
        tree_figure(tree, title, most).savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def save_tree(tree: Tree, folder: Path, title: str = "") -> Sequence[Path]:
    """Write ``tree.png`` and ``tree.svg``; the paths of both."""
    picture, text = folder / "tree.png", folder / "tree.svg"
    tree_picture(tree, title).save(picture)
    text.write_text(tree_svg(tree, title), encoding="utf-8")
    return picture, text
