"""Contact sheets: sizes by arithmetic, every part visible by the pixels it changes, and settings
that survive a PNG file."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffalign.drawing import png, sheet
from diffalign.drawing.png import read_settings, save_png
from diffalign.drawing.sheet import Cell, Grid, contact_sheet, measure, paint
from diffalign.tasks.geneval.verdict import Detection

GREEN, RED = (42, 157, 92), (216, 69, 59)


def noise(width, height=None, seed=0):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height or width, width, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


def pixels(image):
    return np.asarray(image).astype(int)


def count(image, color):
    return int((pixels(image) == color).all(-1).sum())


def find(page, picture):
    """Top-left corner where ``picture`` stands in ``page``, found by its first row."""
    page, picture = np.asarray(page), np.asarray(picture)
    height, width = picture.shape[:2]
    for y in range(page.shape[0] - height + 1):
        for x in range(page.shape[1] - width + 1):
            if (page[y, x : x + 4] == picture[0, :4]).all() and (
                page[y : y + height, x : x + width] == picture
            ).all():
                return x, y
    return None


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (64, 256, 256),
        (64, 128, 128),
        (100, 256, 200),
        (100, 150, 200),
        (50, 140, 150),
        (300, 256, 256),
        (1024, 256, 256),
        (256, 256, 256),
    ],
)
def test_shown_size(side, size, expected):
    page = contact_sheet([[noise(side)]], size=size)
    em = min(max(round(expected / 17), 12), 20)
    assert page.mode == "RGB"
    edge = max(em // 4, 3)
    assert page.size == (expected + 2 * round(1.5 * em), expected + 2 * round(1.5 * em) + edge)


def test_small_pictures_keep_their_pixels():
    small = noise(64)
    enlarged = Image.fromarray(np.asarray(small).repeat(4, 0).repeat(4, 1))
    assert find(contact_sheet([[small]]), enlarged) is not None
    exact = noise(256)
    assert find(contact_sheet([[exact]]), exact) is not None


def test_large_pictures_keep_their_shape():
    page = contact_sheet([[Image.new("RGB", (1024, 512), (1, 2, 3))]])
    assert count(page, (1, 2, 3)) == 256 * 128


def test_grid_places_every_picture_in_its_cell():
    grid = [[noise(128, seed=3 * row + column) for column in range(3)] for row in range(2)]
    page = contact_sheet(grid, ["first", "second"], ["a", "b", "c"], size=128)
    places = [[find(page, picture) for picture in row] for row in grid]
    assert len({x for row in places for x, _ in row}) == 3
    assert len({y for row in places for _, y in row}) == 2
    assert places[0][0] < places[0][1] < places[0][2]
    assert places[1][0][1] >= places[0][0][1] + 128


def test_transparency_lies_on_the_page_and_modes_are_accepted():
    clear = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    page = contact_sheet([[clear]], size=128)
    assert len(np.unique(pixels(page).reshape(-1, 3), axis=0)) == 1
    for mode in ("L", "P", "RGBA", "LA", "1"):
        assert contact_sheet([[noise(64).convert("RGB").convert("L").convert(mode)]]).mode == "RGB"


def test_inputs_are_not_changed():
    image = noise(256)
    before = image.tobytes()
    contact_sheet([[Cell(image, "x", True, [Detection("dog", 0.5, (0, 0, 99, 99))])]], ["r"], ["c"])
    assert image.tobytes() == before


def blank(**options):
    return contact_sheet(
        [[Cell(Image.new("RGB", (128, 128), "#808080"), options.pop("caption", ""))]],
        size=128,
        **options,
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("options", "grows"),
    [
        ({"rows": ["prompt"]}, 0),
        ({"columns": ["nag"]}, 1),
        ({"title": "T"}, 1),
        ({"footer": "f"}, 1),
        ({"caption": "9 NFE"}, 1),
    ],
)
def test_each_label_adds_ink_and_room(options, grows, theme):
    bare, labelled = blank(theme=theme), blank(theme=theme, **dict(options))
    assert labelled.size[grows] > bare.size[grows]
    assert labelled.size[1 - grows] == bare.size[1 - grows]
    page = np.array(pixels(bare)[0, 0])
    ink = [(np.abs(pixels(image) - page).sum(-1) > 150).sum() for image in (bare, labelled)]
    assert ink[1] > ink[0] + 10


def test_different_texts_look_different():
    for name in ("title", "footer"):
        assert blank(**{name: "cfg"}).tobytes() != blank(**{name: "apg"}).tobytes()
    for name in ("rows", "columns"):
        assert blank(**{name: ["cfg"]}).tobytes() != blank(**{name: ["apg"]}).tobytes()


def test_long_labels_grow_the_page_instead_of_being_cut():
    words = "a photo of a weathered lighthouse on a cliff " * 12
    page = blank(rows=[words])
    assert page.height > blank(rows=["a"]).height
    assert blank(rows=[words + "end"]).tobytes() != page.tobytes()
    font = ImageFont.load_default(14)
    for text in (
        words,
        "adaptive-guidance:scale=5,threshold=0.99+nag:scale=4,tau=2.5",
        "x" * 90,
        "a\n\nb",
        "one",
    ):
        lines = sheet.wrap(text, font, 90)
        assert all(font.getlength(line) <= 90 for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())
    assert sheet.wrap("scale=5,tau=2+nag", font, 70)[0].endswith((",", "+"))
    assert sheet.wrap("", font, 90) == []
    assert sheet.wrap("mm", font, 1) == ["m", "m"]


def test_built_in_font_has_the_characters_that_reports_use():
    font = sheet._font(20, False, None)
    missing = bytes(font.getmask("\uffff"))
    assert [c for c in "abcéßñøž×·…±≥–—“”σεαΩжЯ→²∞✓" if bytes(font.getmask(c)) == missing] == []


def test_font_option(tmp_path):
    data = (sheet.files("diffalign.drawing") / "fonts" / "DejaVuSans-Bold-subset.ttf").read_bytes()
    (tmp_path / "other.ttf").write_bytes(data)
    assert (
        blank(rows=["cfg"], font=str(tmp_path / "other.ttf")).tobytes()
        != blank(rows=["cfg"]).tobytes()
    )
    with pytest.raises(OSError, match="resource"):
        blank(rows=["cfg"], font=str(tmp_path / "absent.ttf"))


def test_verdict_frame_and_mark():
    gray = Image.new("RGB", (128, 128), "#808080")
    none, good, bad = (
        contact_sheet([[Cell(gray, "c", correct)]], size=128) for correct in (None, True, False)
    )
    edge = 3
    frame = (128 + 2 * edge) ** 2 - 128**2
    for page, color, other in ((good, GREEN, RED), (bad, RED, GREEN)):
        assert (
            frame < count(page, color) < frame + 17**2
        )  # the frame, and a round mark of 17 px with a white sign
        assert count(page, other) == 0
        assert count(page, (128, 128, 128)) == 128**2  # outside the picture: it hides nothing
    assert count(none, GREEN) == count(none, RED) == 0


def test_marks_differ_without_colour():
    tick, cross = (
        pixels(sheet._mark(correct, 24).convert("RGBA"))[..., :3].min(-1) > 200
        for correct in (True, False)
    )
    assert (tick != cross).sum() > 20


def test_boxes_are_drawn_where_they_are():
    gray = Image.new("RGB", (64, 64), "#808080")
    boxes = [
        Detection("dog", 0.9, (16, 32, 48, 60), "red"),
        Detection("cat", 0.5, (-9, 40, 10, 90)),
    ]
    page = contact_sheet([[Cell(gray, boxes=boxes)]])
    margin = (page.width - 256) // 2
    inner = pixels(page)[margin : margin + 256, margin : margin + 256]
    dog, cat = (tuple(bytes.fromhex(color[1:])) for color in sheet._BOXES[:2])
    assert (
        tuple(inner[200, 64])
        == tuple(inner[200, 192])
        == tuple(inner[128, 150])
        == tuple(inner[240, 100])
        == dog
    )
    assert tuple(inner[200, 128]) == (128, 128, 128)
    assert (
        tuple(inner[200, 0]) == tuple(inner[255, 20]) == tuple(inner[200, 40]) == cat
    )  # clipped to the picture
    named = contact_sheet([[Cell(gray, boxes=[Detection("cow", 0.9, (16, 32, 48, 60), "red")])]])
    other = contact_sheet([[Cell(gray, boxes=[Detection("dog", 0.9, (16, 32, 48, 60), "red")])]])
    assert named.tobytes() != other.tobytes()


def contrast(a, b):
    def luminance(color):
        channels = [
            c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
            for c in bytes.fromhex(color[1:])
        ]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_legible_by_the_web_guideline():
    for theme in sheet._THEMES.values():
        assert contrast(theme["text"], theme["page"]) > 7
        assert contrast(theme["muted"], theme["page"]) > 4.5
    assert all(contrast("#ffffff", color) > 4.5 for color in sheet._BOXES)


def test_a_layout_by_hand():
    """The widest picture is 4 x 40 pixels: em 12, edge 3, gap 10, margin 18. Smaller ones stand in
    the middle of their cells."""
    pictures = [[Cell(noise(128), "c", True), None], [Cell(noise(64)), Cell(noise(40))]]
    layout = measure(Grid(pictures, columns=("a", "b"), size=128))
    first, empty, second, small = layout.places
    assert (layout.edge, layout.mark) == (3, 17)
    label = round(1.35 * 12) + 12 // 2 + 3
    assert first[1:5] == (18 + 16, 18 + label, 128, 128)
    assert empty == (None, 18 + 160 + 10, 18 + label, 160, 128, (0, 0))
    assert first.mark == (18 + 160 - 17, first.y + 128 + 3 + 4)
    below = 128 + 3 + 17 + 12 // 3
    assert small[1:5] == (empty.x, first.y + below + 10 + 6, 160, 160)
    assert second[1:5] == (18 + 16, small.y + 16, 128, 128)
    assert layout.size == (18 + 2 * 160 + 10 + 18, small.y + 160 + 3 + 18)
    assert [text.lines for text in layout.texts] == [[], ["a"], ["b"], ["c"], [], [], []]
    assert paint(layout).size == layout.size


def test_empty_cells():
    page = contact_sheet([[noise(128), None]], size=128)
    assert count(page, tuple(bytes.fromhex(sheet._THEMES["light"]["empty"][1:]))) == 126**2
    assert contact_sheet([[None]], size=128).width > 128


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "images"),
        (([[]],), {}, "images"),
        (([[None], [None, None]],), {}, "images"),
        (([[None]], ["a", "b"]), {}, "rows must hold 1"),
        (([[None]], [], "ab"), {}, "columns must hold 1"),
        (([[None]], "a"), {}, "rows must hold 1"),
        (([[None]],), {"theme": "pink"}, "theme"),
        (([[None]],), {"size": 100}, "size"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(*arguments, **options)


def test_settings_round_trip(tmp_path):
    settings = {
        "prompt": "“café” 日本 \n",
        "technique": {"name": "nag", "scale": 4.5, "window": [0, None, True]},
        "seed": 2**63 - 1,
        "hi": float("inf"),
    }
    image = noise(64)
    save_png(image, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as back:
        assert back.convert("RGB").tobytes() == image.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    save_png(image, str(tmp_path / "a.png"), {})
    assert read_settings(str(tmp_path / "a.png")) == {}


def test_settings_lie_in_a_text_chunk_of_the_standard(tmp_path):
    save_png(noise(8), tmp_path / "a.png", {"seed": 1})
    data, chunks, at = (tmp_path / "a.png").read_bytes(), {}, 8
    while at < len(data):  # length, type, data, checksum: the PNG standard, 5.3
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        assert (
            zlib.crc32(data[at + 4 : at + 8 + length])
            == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        )
        at += 12 + length
    assert chunks[b"tEXt"] == b'diffalign\0{"seed": 1}'


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        save_png(noise(8), tmp_path / "a.jpg", {})
    with pytest.raises(TypeError, match="JSON"):
        save_png(noise(8), tmp_path / "a.png", {"x": object()})
    with pytest.raises(OSError, match="absent"):
        save_png(noise(8), tmp_path / "absent" / "a.png", {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_png(noise(8), tmp_path / "a.png", {"seed": 1})

    def torn(self, path, **_):
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save_png(noise(8), tmp_path / "a.png", {"seed": 2})
    assert read_settings(tmp_path / "a.png") == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_files_without_settings(tmp_path):
    noise(8).save(tmp_path / "plain.png")
    noise(8).save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_text("no image")
    for value in ("{", "[1]"):
        info = png.PngInfo()
        info.add_text(png.CHUNK, value)
        noise(8).save(tmp_path / f"{len(value)}.png", pnginfo=info)
    for name, message in [
        ("plain.png", "carries no"),
        ("b.jpg", "carries no"),
        ("c.png", "not an image"),
        ("1.png", "not JSON"),
        ("3.png", "object"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "absent.png")


def test_fonts_travel_with_their_licence():
    folder = sheet.files("diffalign.drawing") / "fonts"
    assert b"Bitstream Vera Fonts Copyright" in (folder / "LICENSE").read_bytes()
    assert b"DejaVu Sans" in (folder / "NOTICE").read_bytes()
    sheets = {
        hashlib.sha256(blank(rows=["cfg"], title="NAG").tobytes()).hexdigest() for _ in range(2)
    }
    assert len(sheets) == 1
