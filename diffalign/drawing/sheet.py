"""Contact sheets: a labelled grid of images for comparisons and reports, and settings inside saved
PNG files.

A sheet looks the same everywhere: its fonts travel with the package. The built-in fonts cover
Latin, Greek and Cyrillic; pass ``font=`` for another script. Pillow only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from diffalign.drawing.png import read_settings, save_png
from diffalign.tasks.geneval.verdict import Detection

__all__ = ["Cell", "contact_sheet", "read_settings", "save_png"]

SMALLEST = 128  # px: below this, an image is enlarged
Font = ImageFont.FreeTypeFont
_THEMES = {
    "light": {
        "page": "#f7f7f5",
        "text": "#1b1c1e",
        "muted": "#62656b",
        "line": "#dcdcd8",
        "empty": "#ececea",
    },
    "dark": {
        "page": "#16171a",
        "text": "#eeeeec",
        "muted": "#9b9fa6",
        "line": "#303238",
        "empty": "#202226",
    },
}
_GOOD, _BAD = "#2a9d5c", "#d8453b"
_BOXES = (
    "#0072b2",
    "#b3541e",
    "#7b4fb5",
    "#00796b",
    "#b0307a",
    "#5d6b00",
    "#4455cc",
    "#8a5a00",
)  # white text is legible on each


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of a sheet: ``caption`` below it, for ``correct`` a frame around it and a mark
    beside the caption (True green tick, False red cross, None nothing), and ``boxes`` in pixels of
    ``image``, drawn with colour, class and score."""

    image: Image.Image
    caption: str = ""
    correct: bool | None = None
    boxes: Sequence[Detection] = ()


@cache
def _font(size: int, bold: bool, path: str | None) -> Font:
    if path is not None:
        return ImageFont.truetype(path, size)
    data = (
        files("diffalign.drawing") / "fonts" / f"DejaVuSans{'-Bold' if bold else ''}-subset.ttf"
    ).read_bytes()
    return ImageFont.truetype(BytesIO(data), size)


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels: at blanks, after ``, + / : ;``, and
    inside a word only if it alone is too long. Nothing is cut off; a line holds at least one
    character."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for atom in re.findall(r"\s*(?:[^\s,+/:;]+[,+/:;]*|[,+/:;]+)", paragraph):
            if line and font.getlength(line + atom) > width:
                lines.append(line)
                line = ""
            line = line + atom if line else atom.lstrip()
            while len(line) > 1 and font.getlength(line) > width:
                fit = next(
                    n
                    for n in range(len(line) - 1, 0, -1)
                    if n == 1 or font.getlength(line[:n]) <= width
                )
                lines.append(line[:fit])
                line = line[fit:]
        lines.append(line)
    return lines


@dataclass(frozen=True, slots=True)
class _Text:
    """Wrapped text with its size in pixels; a line of n pixels size takes 1.35 n."""

    lines: list[str]
    font: Font
    color: str

    @property
    def height(self) -> int:
        return round(1.35 * self.font.size) * len(self.lines)

    @property
    def width(self) -> int:
        return max((round(self.font.getlength(line) + 0.5) for line in self.lines), default=0)

    def draw(self, on: ImageDraw.ImageDraw, x: float, y: float) -> None:
        step = round(1.35 * self.font.size)
        for number, line in enumerate(self.lines):
            on.text(
                (x, y + number * step + step / 2),
                line,
                font=self.font,
                fill=self.color,
                anchor="lm",
            )


def _shown(image: Image.Image, size: int, page: str) -> Image.Image:
    """The picture as it appears: longest side at most ``size``; a small one enlarged by a whole
    factor, so that pixels stay pixels."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, page), image.convert("RGBA"))
    image = image.convert("RGB")
    side = max(image.size)
    if side > size:
        scale = size / side
        return image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
    factor = max(size // side, -(-SMALLEST // side))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _draw_boxes(shown: Image.Image, cell: Cell, font: Font) -> None:
    pen = ImageDraw.Draw(shown)
    scale_x, scale_y = shown.width / cell.image.width, shown.height / cell.image.height
    names = list(dict.fromkeys(box.name for box in cell.boxes))
    for box in cell.boxes:
        color = _BOXES[names.index(box.name) % len(_BOXES)]
        x1, x2 = sorted(min(max(x * scale_x, 0), shown.width - 1) for x in box.box[::2])
        y1, y2 = sorted(min(max(y * scale_y, 0), shown.height - 1) for y in box.box[1::2])
        pen.rectangle((x1, y1, x2, y2), outline=color, width=2)
        text = f"{box.colour + ' ' if box.colour else ''}{box.name} {box.score:.2f}"
        width, height = font.getlength(text) + 6, round(1.3 * font.size)
        left = min(x1, max(shown.width - width, 0))
        top = y1 - height if y1 >= height else y1
        pen.rectangle((left, top, left + width, top + height), fill=color)
        pen.text((left + 3, top + height / 2), text, font=font, fill="white", anchor="lm")


@cache
def _mark(correct: bool, size: int) -> Image.Image:
    """A round mark with a tick or a cross (never colour alone), drawn at four times its size and
    reduced."""
    n = 4 * size
    mark = Image.new("RGBA", (n, n), (0, 0, 0, 0))
    pen = ImageDraw.Draw(mark)
    pen.ellipse((0, 0, n - 1, n - 1), fill=_GOOD if correct else _BAD)
    strokes = (
        [[(0.28, 0.53), (0.44, 0.68), (0.73, 0.35)]]
        if correct
        else [[(0.33, 0.33), (0.67, 0.67)], [(0.67, 0.33), (0.33, 0.67)]]
    )
    for stroke in strokes:
        pen.line([(x * n, y * n) for x, y in stroke], fill="white", width=n // 9, joint="curve")
    return mark.resize((size, size), Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[Sequence[Image.Image | Cell | None]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    title: str = "",
    footer: str = "",
    size: int = 256,
    theme: Literal["light", "dark"] = "light",
    font: str | None = None,
) -> Image.Image:
    """A labelled grid: ``images[row][column]``, row labels (prompts) on the left, column labels
    (techniques) above.

    A cell is a picture, a ``Cell`` or None (left empty). Pictures larger than ``size`` pixels are
    reduced, smaller ones enlarged by a whole factor up to ``size`` and at least to 128. Labels wrap
    and nothing is cut off. ``font`` is a TrueType file for scripts that the built-in font lacks.
    Returns an RGB image.

    Raises: ValueError for an empty or ragged grid, labels that do not match it, an unknown theme or
    ``size`` < 128; OSError for a font that cannot be read.
    """
    if theme not in _THEMES:
        raise ValueError(f"theme must be one of {', '.join(_THEMES)}; got {theme!r}.")
    if size < SMALLEST:
        raise ValueError(
            f"size must be at least {SMALLEST} pixels, below which labels are not legible; got "
            f"{size}."
        )
    if not images or not images[0] or len({len(row) for row in images}) != 1:
        raise ValueError(
            "images must be rows of equal, positive length; got lengths "
            f"{[len(row) for row in images]}. Fill gaps with None."
        )
    for name, labels, count in (("rows", rows, len(images)), ("columns", columns, len(images[0]))):
        if labels and (isinstance(labels, str) or len(labels) != count):
            raise ValueError(
                f"{name} must hold {count} labels for this grid or none; got {labels!r}."
            )
    color = _THEMES[theme]
    grid = [
        [Cell(item) if isinstance(item, Image.Image) else item for item in row] for row in images
    ]
    shown = [
        [_shown(cell.image, size, color["page"]) if cell else None for cell in row] for row in grid
    ]
    pictures = [picture for line in shown for picture in line if picture]
    width = max((picture.width for picture in pictures), default=size)
    heights = [
        max((picture.height for picture in line if picture), default=width) for line in shown
    ]
    em = min(max(round(width / 17), 12), 20)
    regular, small, bold, large = (
        _font(n, b, font)
        for n, b in ((em, False), (em - 1, False), (em, True), (round(1.4 * em), True))
    )
    tiny = _font(max(em - 3, 10), False, font)
    edge, mark_size = max(em // 4, 3), round(1.4 * em)
    gap, margin = max(em // 2, 2 * edge + 4), round(1.5 * em)

    row_labels = [
        _Text(wrap(label, regular, round(0.9 * width)), regular, color["text"]) for label in rows
    ]
    left = margin + (
        max(label.width for label in row_labels) + round(1.2 * em) if row_labels else 0
    )
    page_width = left + len(grid[0]) * (width + gap) - gap + margin
    head = _Text(wrap(title, large, page_width - 2 * margin), large, color["text"])
    foot = _Text(wrap(footer, small, page_width - 2 * margin), small, color["muted"])
    column_labels = [_Text(wrap(label, bold, width), bold, color["text"]) for label in columns]
    captions = [
        [
            _Text(
                wrap(
                    cell.caption,
                    small,
                    width - (0 if cell.correct is None else mark_size + em // 3),
                )
                if cell
                else [],
                small,
                color["muted"],
            )
            for cell in row
        ]
        for row in grid
    ]
    feet = [
        max(
            max(text.height, 0 if cell is None or cell.correct is None else mark_size)
            for cell, text in zip(*pair)
        )
        for pair in zip(grid, captions)
    ]
    below = [edge + (foot + em // 3 if foot else 0) for foot in feet]
    tall = [
        max(height + extra, row_labels[i].height if row_labels else 0)
        for i, (height, extra) in enumerate(zip(heights, below))
    ]
    labels_height = max((label.height for label in column_labels), default=0) + (
        em // 2 + edge if column_labels else 0
    )
    top = margin + (head.height + em // 2 if head.lines else 0)
    page_height = (
        top
        + labels_height
        + sum(tall)
        + (gap + em // 2) * (len(tall) - 1)
        + (foot.height + em if foot.lines else 0)
        + margin
    )

    page = Image.new("RGB", (page_width, page_height), color["page"])
    pen = ImageDraw.Draw(page)
    head.draw(pen, margin, margin)
    for column, label in enumerate(
        column_labels
    ):  # bottom-aligned, so that each stands on its column
        label.draw(
            pen, left + column * (width + gap), top + labels_height - em // 2 - edge - label.height
        )
    y = top + labels_height
    for row, cells in enumerate(grid):
        if row_labels:
            row_labels[row].draw(
                pen, margin, y + max(heights[row] - row_labels[row].height, 0) // 2
            )
        for column, cell in enumerate(cells):
            x, picture = left + column * (width + gap), shown[row][column]
            if cell is None or picture is None:
                pen.rectangle(
                    (x, y, x + width - 1, y + heights[row] - 1),
                    fill=color["empty"],
                    outline=color["line"],
                )
                continue
            _draw_boxes(picture, cell, tiny)
            px, py = x + (width - picture.width) // 2, y + (heights[row] - picture.height) // 2
            page.paste(picture, (px, py))
            under = y + heights[row] + edge + em // 3
            captions[row][column].draw(pen, x, under)
            if cell.correct is not None:
                outside = (
                    px - edge,
                    py - edge,
                    px + picture.width - 1 + edge,
                    py + picture.height - 1 + edge,
                )
                pen.rectangle(outside, outline=_GOOD if cell.correct else _BAD, width=edge)
                page.paste(
                    _mark(cell.correct, mark_size),
                    (x + width - mark_size, under),
                    _mark(cell.correct, mark_size),
                )
        y += tall[row] + gap + em // 2
    foot.draw(pen, margin, page_height - margin - foot.height)
    return page
