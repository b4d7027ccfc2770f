"""The 80 object pictures of the embedded world: one atlas PNG in the package, and the tints made
from it.

68 pictures are glyphs of Noto Color Emoji (SIL OFL 1.1, see ``data/NOTICE`` and ``data/OFL.txt``),
12 are drawn in ``drawn.py``. The font is needed only to rebuild the atlas: ``python -m
diffalign.embedded.world.glyphs --font PATH/NotoColorEmoji.ttf``.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from diffalign.embedded.world.drawn import DRAWINGS, draw
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

ATLAS = Path(__file__).parent / "data" / "glyphs.png"
GLYPH = 64
"""Side of one picture in the atlas, in pixels; the atlas holds 8 rows of 10 in the order of
``OBJECTS``."""

CODE_POINTS: dict[str, int] = {
    "person": 0x1F9D1, "bicycle": 0x1F6B2, "car": 0x1F697, "motorcycle": 0x1F3CD,
    "airplane": 0x2708, "bus": 0x1F68C, "train": 0x1F682, "truck": 0x1F69A, "boat": 0x26F5,
    "traffic light": 0x1F6A6, "stop sign": 0x1F6D1, "bird": 0x1F426, "cat": 0x1F431, "dog": 0x1F436,
    "horse": 0x1F40E, "sheep": 0x1F411, "cow": 0x1F42E, "elephant": 0x1F418, "bear": 0x1F43B,
    "zebra": 0x1F993, "giraffe": 0x1F992, "backpack": 0x1F392, "umbrella": 0x2602,
    "handbag": 0x1F45C, "tie": 0x1F454, "suitcase": 0x1F9F3, "frisbee": 0x1F94F, "skis": 0x1F3BF,
    "snowboard": 0x1F3C2, "sports ball": 0x26BD, "kite": 0x1FA81, "baseball glove": 0x1F9E4,
    "skateboard": 0x1F6F9, "surfboard": 0x1F3C4, "tennis racket": 0x1F3F8, "bottle": 0x1F37E,
    "wine glass": 0x1F377, "cup": 0x2615, "fork": 0x1F374, "knife": 0x1F52A, "spoon": 0x1F944,
    "bowl": 0x1F963, "banana": 0x1F34C, "apple": 0x1F34E, "sandwich": 0x1F96A, "orange": 0x1F34A,
    "broccoli": 0x1F966, "carrot": 0x1F955, "hot dog": 0x1F32D, "pizza": 0x1F355, "donut": 0x1F369,
    "cake": 0x1F382, "chair": 0x1FA91, "couch": 0x1F6CB, "potted plant": 0x1FAB4, "bed": 0x1F6CF,
    "toilet": 0x1F6BD, "tv": 0x1F4FA, "laptop": 0x1F4BB, "computer mouse": 0x1F5B1,
    "computer keyboard": 0x2328, "cell phone": 0x1F4F1, "book": 0x1F4D5, "clock": 0x23F0,
    "vase": 0x1F3FA, "scissors": 0x2702, "teddy bear": 0x1F9F8, "toothbrush": 0x1FAA5,
}  # fmt: skip
"""Object name -> Unicode code point of its glyph; the other 12 objects are in
``drawn.DRAWINGS``."""

RAMPS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((150, 10, 20), (245, 70, 60)),
    "orange": ((222, 100, 0), (255, 170, 60)),
    "yellow": ((225, 185, 0), (255, 245, 110)),
    "green": ((10, 95, 35), (90, 205, 100)),
    "blue": ((15, 45, 150), (90, 145, 255)),
    "purple": ((80, 20, 130), (175, 95, 225)),
    "pink": ((235, 90, 155), (255, 185, 218)),
    "brown": ((66, 36, 14), (150, 95, 55)),
    "black": ((6, 6, 8), (88, 88, 94)),
    "white": ((172, 172, 178), (255, 255, 255)),
}
"""Colour -> RGB of the darkest and the lightest pixel of a tinted picture; between them the
picture's own luminance interpolates."""


def _resized(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resample in premultiplied alpha; the filter overshoots at edges, so colour is clipped to
    alpha. uint8 [h, w, 4], premultiplied."""
    pixels = np.array(image.convert("RGBa").resize(size, Image.Resampling.LANCZOS))
    pixels[pixels[..., 3] < 12] = 0
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
    return pixels


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """``image`` cropped to its opaque box and scaled so that the longer side fills a ``side`` x
    ``side`` square, centred."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0).getbbox()
    if box is None:
        raise ValueError(
            "The font drew nothing for this code point; it must be a colour bitmap font such as "
            "Noto Color Emoji."
        )
    cropped = image.crop(box)
    scale = side / max(cropped.size)
    width, height = (max(1, round(length * scale)) for length in cropped.size)
    premultiplied = _resized(cropped, (width, height)).astype(np.float64)
    straight = premultiplied.copy()
    straight[..., :3] *= 255.0 / np.maximum(premultiplied[..., 3:], 1.0)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(
        Image.fromarray(np.rint(straight).astype(np.uint8)),
        ((side - width) // 2, (side - height) // 2),
    )
    return square


def build_atlas(font_path: str) -> Image.Image:
    """Rasterise all 80 pictures into one RGBA image of 10 x 8 cells of ``GLYPH`` pixels.

    ``font_path`` is NotoColorEmoji.ttf.
    """
    font = ImageFont.truetype(font_path, 109)
    atlas = Image.new("RGBA", (10 * GLYPH, 8 * GLYPH), (0, 0, 0, 0))
    for index, name in enumerate(OBJECTS):
        if name in DRAWINGS:
            picture = draw(name)
        else:
            picture = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
            ImageDraw.Draw(picture).text(
                (12, 12), chr(CODE_POINTS[name]), font=font, embedded_color=True
            )
        atlas.paste(_cropped(picture, GLYPH), (index % 10 * GLYPH, index // 10 * GLYPH))
    return atlas


@functools.cache
def _atlas() -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(ATLAS).convert("RGBA"))


def glyph(name: str) -> npt.NDArray[np.uint8]:
    """The picture of ``name`` as drawn: uint8 [GLYPH, GLYPH, 4], straight alpha. Raises ValueError
    for an unknown name."""
    if name not in OBJECTS:
        raise ValueError(f"glyph(name=...) must be one of GenEval's 80 object names; got {name!r}.")
    row, column = divmod(OBJECTS.index(name), 10)
    return _atlas()[row * GLYPH : (row + 1) * GLYPH, column * GLYPH : (column + 1) * GLYPH]


def _tinted(picture: npt.NDArray[np.uint8], colour: str) -> npt.NDArray[np.uint8]:
    """Replace the hue by the ramp of ``colour``: luminance, stretched between its 3rd and 97th
    percentile, chooses the place on the ramp."""
    luminance = picture[..., :3] @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(luminance[picture[..., 3] > 128], (3, 97))
    place = np.clip((luminance - low) / max(high - low, 1.0), 0.0, 1.0)[..., None]
    dark, light = (np.array(end, dtype=np.float64) for end in RAMPS[colour])
    tinted = picture.copy()
    tinted[..., :3] = np.rint(dark + (light - dark) * place)
    return tinted


def sprite(name: str, colour: str, side: int) -> npt.NDArray[np.uint8]:
    """One picture, tinted (or as drawn for "native"), scaled to ``side`` pixels: uint8 [side, side,
    4], **premultiplied** alpha."""
    picture = glyph(name)
    if colour in RAMPS:
        picture = _tinted(picture, colour)
    return _resized(Image.fromarray(picture), (side, side))


@functools.cache
def sprites(side: int, margin: int) -> npt.NDArray[np.uint8]:
    """All pictures: uint8 [80, 11, side, side, 4], premultiplied, with ``margin`` empty pixels on
    every side.

    The second axis is the ten colours in order, then native. Costs about 1 s once, then cached; 3.6
    MB at side 32.
    """
    table = np.zeros((len(OBJECTS), len(COLOURS) + 1, side, side, 4), dtype=np.uint8)
    inner = slice(margin, side - margin)
    for i, name in enumerate(OBJECTS):
        for j, colour in enumerate((*COLOURS, "native")):
            table[i, j, inner, inner] = sprite(name, colour, side - 2 * margin)
    table.flags.writeable = False
    return table


def main() -> None:
    """Command line: rebuild the atlas from a font file."""
    parser = argparse.ArgumentParser(description="Rebuild the glyph atlas of the embedded world.")
    parser.add_argument("--font", required=True, help="path of NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=ATLAS)
    options = parser.parse_args()
    build_atlas(options.font).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
