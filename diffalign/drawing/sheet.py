"""Contact sheets: a labelled grid of images for comparisons and reports.

``measure`` says where everything stands, ``paint`` draws it. A sheet looks the same everywhere: its
fonts travel with the package. They cover Latin, Greek and Cyrillic; pass ``font=`` for another
script. Pillow only.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Literal, NamedTuple, Protocol

from PIL import Image, ImageDraw, ImageFont

# an image with a smaller longest side is enlarged to at least this, in pixels
SMALLEST = 128
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
# white text is legible on each
_BOXES = (
    "#0072b2",
    "#b3541e",
    "#7b4fb5",
    "#00796b",
    "#b0307a",
    "#5d6b00",
    "#4455cc",
    "#8a5a00",
)


class Detection(Protocol):
    """An object that a detector saw, as ``diffalign.tasks.geneval.verdict`` describes it."""

    @property
    def name(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def box(self) -> tuple[float, float, float, float]: ...
    @property
    def colour(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of a sheet."""

    image: Image.Image
    # text below the picture
    caption: str = ""
    # True: green frame and a tick beside the caption; False: red frame and a cross; None: neither
    correct: bool | None = None
    # in pixels of ``image``, drawn with colour, class and score
    boxes: Sequence[Detection] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """What a sheet shows; checked when it is built."""

    # [row][column], None is an empty cell
    cells: Sequence[Sequence[Cell | None]]
    # labels on the left and above; none, or one for each
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    title: str = ""
    footer: str = ""
    # longest side of a picture, in pixels
    size: int = 256
    theme: str = "light"
    # TrueType file, None is the built-in font
    font: str | None = None

    def __post_init__(self) -> None:
        if self.theme not in _THEMES:
            raise ValueError(f"theme must be one of {', '.join(_THEMES)}; got {self.theme!r}.")
        if self.size < SMALLEST:
            raise ValueError(
                f"size must be at least {SMALLEST} pixels, below which labels are not legible; got "
                f"{self.size}."
            )
        lengths = [len(row) for row in self.cells]
        if not lengths or not lengths[0] or len(set(lengths)) != 1:
            raise ValueError(
                f"images must be rows of equal, positive length; got lengths {lengths}. Fill gaps "
                "with None."
            )
        for name, labels, count in (
            ("rows", self.rows, len(lengths)),
            ("columns", self.columns, lengths[0]),
        ):
            if labels and (isinstance(labels, str) or len(labels) != count):
                raise ValueError(
                    f"{name} must hold {count} labels for this grid or none; got {labels!r}."
                )


@dataclass(frozen=True, slots=True)
class Text:
    """Wrapped text at its place; a line of a font of n pixels is 1.35 n high."""

    lines: list[str]
    font: Font
    color: str
    x: float = 0
    y: float = 0

    @property
    def step(self) -> int:
        return round(1.35 * self.font.size)

    @property
    def height(self) -> int:
        return self.step * len(self.lines)

    @property
    def width(self) -> int:
        return max((round(self.font.getlength(line) + 0.5) for line in self.lines), default=0)

    def at(self, x: float, y: float) -> "Text":
        """The same text elsewhere."""
        return Text(self.lines, self.font, self.color, x, y)


class Place(NamedTuple):
    """Where a cell stands, in pixels of the page."""

    cell: Cell | None
    # the picture, or the empty cell: left, top, width, height
    x: int
    y: int
    width: int
    height: int
    # upper left corner of the mark beside the caption
    mark: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a sheet stands, in pixels."""

    # width and height of the page
    size: tuple[int, int]
    places: tuple[Place, ...]
    texts: tuple[Text, ...]
    # width of a verdict's frame, side of its mark
    edge: int
    mark: int
    # of the names at detections
    font: Font
    theme: str


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
    cells = [
        [Cell(item) if isinstance(item, Image.Image) else item for item in row] for row in images
    ]
    return paint(measure(Grid(cells, rows, columns, title, footer, size, theme, font)))


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


def shown_size(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height at which a picture appears: longest side at most ``size``; a small one
    enlarged by a whole factor, so that pixels stay pixels."""
    side = max(image.size)
    if side > size:
        scale = size / side
        return max(1, round(image.width * scale)), max(1, round(image.height * scale))
    factor = max(size // side, -(-SMALLEST // side))
    return image.width * factor, image.height * factor


class _Measure:
    """Fonts and distances of a sheet, all from the width of its pictures."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.sizes = [
            [shown_size(cell.image, grid.size) if cell else None for cell in row]
            for row in grid.cells
        ]
        pictures = [size for line in self.sizes for size in line if size]
        self.width = max((width for width, _ in pictures), default=grid.size)
        # of the pictures of each row
        self.heights = [
            max((size[1] for size in line if size), default=self.width) for line in self.sizes
        ]
        em = self.em = min(max(round(self.width / 17), 12), 20)
        self.gap, self.margin = max(em // 2, 2 * self.edge + 4), round(1.5 * em)
        color = _THEMES[grid.theme]
        labels = [
            self.text(label, 0, color["text"], round(0.9 * self.width)) for label in grid.rows
        ]
        room = max(label.width for label in labels) + round(1.2 * em) if labels else 0
        self.left = self.margin + room
        columns = len(grid.cells[0])
        self.page = self.left + columns * (self.width + self.gap) - self.gap + self.margin
        inner = self.page - 2 * self.margin
        self.head = self.text(grid.title, round(0.4 * em), color["text"], inner, bold=True)
        self.foot = self.text(grid.footer, -1, color["muted"], inner)
        self.rows = labels
        self.columns = [
            self.text(label, 0, color["text"], self.width, bold=True) for label in grid.columns
        ]
        self.captions = [[self.caption(cell) for cell in row] for row in grid.cells]

    @property
    def edge(self) -> int:
        """Width of a verdict's frame."""
        return max(self.em // 4, 3)

    @property
    def mark(self) -> int:
        """Side of a verdict's mark."""
        return round(1.4 * self.em)

    def text(self, text: str, larger: int, color: str, width: int, bold: bool = False) -> Text:
        font = _font(self.em + larger, bold, self.grid.font)
        return Text(wrap(text, font, width), font, color)

    def caption(self, cell: Cell | None) -> Text:
        beside = 0 if cell is None or cell.correct is None else self.mark + self.em // 3
        caption = cell.caption if cell else ""
        return self.text(caption, -1, _THEMES[self.grid.theme]["muted"], self.width - beside)

    def row_heights(self) -> list[int]:
        """Of each row: its pictures with what stands below them, or its label."""
        result = []
        for i, (cells, texts) in enumerate(zip(self.grid.cells, self.captions, strict=True)):
            below = max(
                max(text.height, 0 if cell is None or cell.correct is None else self.mark)
                for cell, text in zip(cells, texts, strict=True)
            )
            height = self.heights[i] + self.edge + (below + self.em // 3 if below else 0)
            result.append(max(height, self.rows[i].height if self.rows else 0))
        return result

    def row(self, i: int, y: int) -> Iterator[Place | Text]:
        """Places and captions of a row whose pictures begin at ``y``."""
        under = y + self.heights[i] + self.edge + self.em // 3
        for column, cell in enumerate(self.grid.cells[i]):
            x = self.left + column * (self.width + self.gap)
            size = self.sizes[i][column]
            if cell is None or size is None:
                yield Place(None, x, y, self.width, self.heights[i])
                continue
            left, top = x + (self.width - size[0]) // 2, y + (self.heights[i] - size[1]) // 2
            yield Place(cell, left, top, *size, (x + self.width - self.mark, under))
            yield self.captions[i][column].at(x, under)


def measure(grid: Grid) -> Layout:
    """Where everything of ``grid`` stands. Pure: no pixel is read or drawn."""
    m = _Measure(grid)
    em = m.em
    parts: list[Place | Text] = [m.head.at(m.margin, m.margin)]
    y = m.margin + (m.head.height + em // 2 if m.head.lines else 0)
    if m.columns:
        y += max(label.height for label in m.columns) + em // 2 + m.edge
    for column, label in enumerate(m.columns):  # bottom-aligned: each stands on its column
        x = m.left + column * (m.width + m.gap)
        parts.append(label.at(x, y - em // 2 - m.edge - label.height))
    heights = m.row_heights()
    for i, height in enumerate(heights):
        if m.rows:
            label = m.rows[i]
            parts.append(label.at(m.margin, y + max(m.heights[i] - label.height, 0) // 2))
        parts += m.row(i, y)
        y += height + m.gap + em // 2
    y += (m.foot.height + em if m.foot.lines else 0) + m.margin - m.gap - em // 2
    parts.append(m.foot.at(m.margin, y - m.margin - m.foot.height))
    return Layout(
        size=(m.page, y),
        places=tuple(part for part in parts if isinstance(part, Place)),
        texts=tuple(part for part in parts if isinstance(part, Text)),
        edge=m.edge,
        mark=m.mark,
        font=_font(max(em - 3, 10), False, grid.font),
        theme=grid.theme,
    )


def paint(layout: Layout) -> Image.Image:
    """The sheet as an RGB image."""
    color = _THEMES[layout.theme]
    page = Image.new("RGB", layout.size, color["page"])
    pen = ImageDraw.Draw(page)
    for place in layout.places:
        x, y, width, height = place.x, place.y, place.width, place.height
        if place.cell is None:
            corners = (x, y, x + width - 1, y + height - 1)
            pen.rectangle(corners, fill=color["empty"], outline=color["line"])
            continue
        picture = _scaled(place.cell.image, (width, height), color["page"])
        _draw_boxes(picture, place.cell, layout.font)
        page.paste(picture, (x, y))
        if place.cell.correct is not None:
            edge = layout.edge
            outside = (x - edge, y - edge, x + width - 1 + edge, y + height - 1 + edge)
            outline = _GOOD if place.cell.correct else _BAD
            pen.rectangle(outside, outline=outline, width=edge)
            mark = _mark(place.cell.correct, layout.mark)
            page.paste(mark, place.mark, mark)
    for text in layout.texts:
        for number, line in enumerate(text.lines):
            y_middle = text.y + number * text.step + text.step / 2
            pen.text((text.x, y_middle), line, font=text.font, fill=text.color, anchor="lm")
    return page


def _scaled(image: Image.Image, size: tuple[int, int], page: str) -> Image.Image:
    """The picture at this size, on the colour of the page where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, page), image.convert("RGBA"))
    smaller = size[0] < image.width or size[1] < image.height
    method = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return image.convert("RGB").resize(size, method)


def _draw_boxes(picture: Image.Image, cell: Cell, font: Font) -> None:
    pen = ImageDraw.Draw(picture)
    scale_x, scale_y = picture.width / cell.image.width, picture.height / cell.image.height
    names = list(dict.fromkeys(box.name for box in cell.boxes))
    for box in cell.boxes:
        color = _BOXES[names.index(box.name) % len(_BOXES)]
        x1, x2 = sorted(min(max(x * scale_x, 0), picture.width - 1) for x in box.box[::2])
        y1, y2 = sorted(min(max(y * scale_y, 0), picture.height - 1) for y in box.box[1::2])
        pen.rectangle((x1, y1, x2, y2), outline=color, width=2)
        text = f"{box.colour + ' ' if box.colour else ''}{box.name} {box.score:.2f}"
        width, height = font.getlength(text) + 6, round(1.3 * font.size)
        x = min(x1, max(picture.width - width, 0))
        top = y1 - height if y1 >= height else y1
        pen.rectangle((x, top, x + width, top + height), fill=color)
        pen.text((x + 3, top + height / 2), text, font=font, fill="white", anchor="lm")


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
