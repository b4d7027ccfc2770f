"""Simple drawings of the 12 GenEval objects for which Noto Color Emoji has no glyph.

Each function paints on a 128 x 128 canvas through ``Pen``, which supersamples by four. They are
only needed to rebuild the glyph atlas.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
_SUPERSAMPLE = 4


class Pen:
    """Drawing primitives in units of a 128 x 128 canvas; a colour is ``#rrggbb``."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (128 * _SUPERSAMPLE, 128 * _SUPERSAMPLE), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def _scaled(self, values: tuple[float, ...]) -> list[float]:
        return [value * _SUPERSAMPLE for value in values]

    def rect(self, box: Box, fill: str, radius: float = 0.0) -> None:
        """Filled rectangle (x1, y1, x2, y2) with rounded corners."""
        self._draw.rounded_rectangle(self._scaled(box), radius * _SUPERSAMPLE, fill=fill)

    def oval(self, box: Box, fill: str) -> None:
        """Filled ellipse inscribed in (x1, y1, x2, y2)."""
        self._draw.ellipse(self._scaled(box), fill=fill)

    def poly(self, points: tuple[float, ...], fill: str) -> None:
        """Filled polygon through x1, y1, x2, y2, ..."""
        self._draw.polygon(self._scaled(points), fill=fill)

    def line(self, points: tuple[float, ...], fill: str, width: float) -> None:
        """Open polyline of the given width."""
        self._draw.line(
            self._scaled(points), fill=fill, width=round(width * _SUPERSAMPLE), joint="curve"
        )


def _fire_hydrant(p: Pen) -> None:
    p.rect((30, 112, 98, 124), "#8e1414", 4)
    p.rect((40, 42, 88, 114), "#d42a22", 4)
    p.oval((40, 14, 88, 62), "#e8473c")
    p.rect((56, 4, 72, 20), "#8e1414", 4)
    p.rect((32, 40, 96, 50), "#8e1414", 4)
    p.rect((16, 60, 112, 84), "#b71f1a", 6)
    p.oval((46, 54, 82, 90), "#f4c430")
    p.oval((56, 64, 72, 80), "#8a6a00")


def _parking_meter(p: Pen) -> None:
    p.rect((57, 66, 71, 124), "#5d6770")
    p.rect((42, 116, 86, 126), "#3d454c", 3)
    p.rect((34, 20, 94, 76), "#4a6fa5", 8)
    p.oval((34, 2, 94, 52), "#4a6fa5")
    p.oval((43, 10, 85, 50), "#e9f1f7")
    p.line((64, 40, 76, 20), "#d42a22", 5)
    p.rect((52, 58, 76, 66), "#1d2b3a", 2)


def _bench(p: Pen) -> None:
    for y in (26, 43):
        p.rect((6, y, 122, y + 12), "#c58a4a", 3)
    p.rect((2, 64, 126, 78), "#9c6430", 3)
    for x in (18, 102):
        p.rect((x, 22, x + 8, 108), "#3f3f46", 2)
    p.rect((8, 76, 16, 108), "#3f3f46")
    p.rect((112, 76, 120, 108), "#3f3f46")


def _baseball_bat(p: Pen) -> None:
    p.line((14, 114, 60, 68), "#8a5a2b", 10)
    p.poly((52, 66, 92, 10, 118, 36, 62, 76), "#d9a45f")
    p.oval((86, 4, 124, 42), "#d9a45f")
    p.line((62, 62, 100, 22), "#f0cf9b", 5)
    p.oval((4, 106, 24, 126), "#5f3c1a")
    p.line((24, 104, 40, 88), "#2b2b2b", 11)


def _dining_table(p: Pen) -> None:
    p.oval((2, 28, 126, 70), "#8a5428")
    p.oval((2, 22, 126, 62), "#c98b4f")
    p.oval((34, 30, 94, 54), "#f4f4f4")
    p.oval((46, 35, 82, 49), "#c9d4dc")
    p.rect((57, 66, 71, 106), "#7a4720")
    p.poly((64, 96, 104, 120, 90, 122, 64, 108, 38, 122, 24, 120), "#7a4720")


def _tv_remote(p: Pen) -> None:
    p.rect((40, 2, 88, 126), "#33373d", 14)
    p.oval((55, 9, 73, 27), "#e53935")
    for row, y in enumerate((36, 54, 72)):
        for x in (47, 59, 71):
            p.rect((x, y, x + 9, y + 11), ("#cfd8dc", "#90caf9", "#cfd8dc")[row], 3)
    p.oval((50, 90, 78, 118), "#cfd8dc")
    p.oval((58, 98, 70, 110), "#33373d")


def _microwave(p: Pen) -> None:
    p.rect((2, 26, 126, 104), "#c9ced3", 6)
    p.rect((10, 34, 88, 96), "#37474f", 5)
    p.rect((18, 42, 80, 88), "#ffe082", 4)
    p.oval((28, 66, 70, 84), "#a1887f")
    p.rect((95, 36, 120, 50), "#1b5e20", 2)
    for y in (58, 72):
        for x in (96, 109):
            p.oval((x, y, x + 10, y + 10), "#546e7a")
    p.rect((95, 88, 120, 97), "#546e7a", 2)
    p.rect((14, 102, 28, 110), "#37474f")
    p.rect((100, 102, 114, 110), "#37474f")


def _oven(p: Pen) -> None:
    p.rect((14, 6, 114, 124), "#eceff1", 5)
    p.rect((14, 6, 114, 36), "#78909c", 5)
    for x in (22, 45, 68, 91):
        p.oval((x, 12, x + 17, 29), "#263238")
    p.rect((24, 42, 104, 50), "#455a64", 4)
    p.rect((24, 56, 104, 106), "#263238", 5)
    p.rect((34, 64, 94, 98), "#ff7043", 3)
    p.rect((34, 80, 94, 84), "#263238")
    p.rect((20, 114, 108, 126), "#90a4ae", 2)


def _toaster(p: Pen) -> None:
    p.rect((26, 4, 58, 60), "#e0a458", 10)
    p.rect((32, 10, 52, 60), "#f7dcae", 7)
    p.rect((66, 4, 98, 60), "#e0a458", 10)
    p.rect((72, 10, 92, 60), "#f7dcae", 7)
    p.rect((6, 46, 118, 114), "#b0bec5", 22)
    p.rect((20, 58, 100, 66), "#eceff1", 3)
    p.rect((110, 58, 126, 72), "#37474f", 3)
    p.oval((50, 80, 74, 104), "#37474f")
    p.rect((16, 112, 108, 120), "#37474f", 3)


def _sink(p: Pen) -> None:
    p.line((64, 52, 64, 18, 90, 18, 90, 34), "#78909c", 11)
    p.oval((84, 38, 96, 52), "#4fc3f7")
    p.rect((40, 30, 56, 38), "#78909c", 3)
    p.rect((2, 54, 126, 72), "#f5f7f8", 8)
    p.poly((10, 68, 118, 68, 100, 104, 28, 104), "#cfd8dc")
    p.rect((14, 62, 114, 70), "#4fc3f7", 4)
    p.rect((52, 102, 76, 126), "#b0bec5", 4)


def _refrigerator(p: Pen) -> None:
    p.rect((28, 2, 100, 122), "#b3e0e6", 8)
    p.rect((28, 44, 100, 49), "#3c6b73")
    p.rect((36, 14, 44, 38), "#3c6b73", 3)
    p.rect((36, 56, 44, 92), "#3c6b73", 3)
    p.rect((64, 60, 86, 80), "#fff59d", 2)
    p.rect((34, 120, 48, 127), "#3c6b73")
    p.rect((80, 120, 94, 127), "#3c6b73")


def _hair_drier(p: Pen) -> None:
    p.poly((50, 64, 80, 60, 88, 122, 62, 124), "#ad1457")
    p.oval((38, 8, 106, 76), "#ec407a")
    p.poly((70, 8, 70, 76, 8, 62, 8, 24), "#ec407a")
    p.rect((2, 18, 16, 68), "#37474f", 4)
    p.oval((66, 24, 100, 58), "#37474f")
    p.oval((75, 33, 91, 49), "#f8bbd0")


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "fire hydrant": _fire_hydrant,
    "parking meter": _parking_meter,
    "bench": _bench,
    "baseball bat": _baseball_bat,
    "dining table": _dining_table,
    "tv remote": _tv_remote,
    "microwave": _microwave,
    "oven": _oven,
    "toaster": _toaster,
    "sink": _sink,
    "refrigerator": _refrigerator,
    "hair drier": _hair_drier,
}
"""Object name -> drawing."""


def draw(name: str) -> Image.Image:
    """The drawing of ``name`` as a 128 x 128 RGBA image.

    Raises KeyError for an object that is a font glyph.
    """
    pen = Pen()
    DRAWINGS[name](pen)
    return pen.image.resize((128, 128), Image.Resampling.LANCZOS)
