"""Charts: ends of axes by hand, nothing outside its axis, names that cover nothing, and pictures
that show what they were given."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffalign.drawing import charts
from diffalign.drawing.charts import Curve, limits, line_chart, stacked


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 20)}


def rgb(text):
    return tuple(bytes.fromhex(text[1:]))


def rows_of(picture, colour):
    """Rows of pixels with this colour, from the top."""
    return np.flatnonzero((np.asarray(picture) == rgb(colour)).all(-1).any(1))


def figure_of(monkeypatch, *arguments, **options):
    """The figure behind a chart."""
    figures = []
    picture = charts._picture
    monkeypatch.setattr(
        charts, "_picture", lambda figure: figures.append(figure) or picture(figure)
    )
    line_chart(*arguments, **options)
    return figures[0]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([1.5, 1.5001], (1.35, 1.65)),
        ([1.5], (1.35, 1.65)),
        ([-2.0, -2.0], (-2.2, -1.8)),
        ([0.0, 0.0], (-1.0, 1.0)),
        ([1.0, 3.0], (0.9, 3.1)),
        ([0.01, 1.0], (0.0, 1.0495)),
        ([0.0, 20.0], (0.0, 21.0)),
        ([-1.0, 1.0], (-1.1, 1.1)),
        ([0.99, 0.992], (0.9899, 0.9921)),
    ],
)
def test_ends_of_an_axis(values, ends):
    assert limits(values) == pytest.approx(ends, abs=2e-4)


def test_ends_of_a_logarithmic_axis():
    assert limits([1.0, 100.0], log=True) == pytest.approx((100**-0.04, 100**1.04))
    assert limits([3.0, 3.0], log=True) == pytest.approx((1.5, 6.0))


def test_a_constant_curve_gets_an_axis_that_a_person_can_read(monkeypatch):
    """A scale that is 1.5 up to rounding is drawn as a level line between 1.35 and 1.65."""
    points = [(i, 1.5 + 1e-4 * (i % 2)) for i in range(20)]
    figure = figure_of(monkeypatch, [Curve("scale", points)])
    ax = figure.axes[0]
    assert ax.get_ylim() == pytest.approx((1.35, 1.65), rel=1e-3)
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert "1.50" in labels
    assert all(len(label) <= 4 for label in labels)
    rows = rows_of(line_chart([Curve("scale", points)]), charts.COLOURS[0])
    level = rows[rows > 100]  # the legend stands above
    assert level.max() - level.min() < 12


def test_steps_are_whole_numbers_and_no_tick_has_an_offset(monkeypatch):
    points = [(i, 1e6 + i) for i in range(4)]
    ax = figure_of(monkeypatch, [Curve("a", points)]).axes[0]
    assert {text.get_text() for text in ax.get_xticklabels()} >= {"0", "1", "2", "3"}
    assert not any("." in text.get_text() for text in ax.get_xticklabels())
    assert ax.yaxis.get_offset_text().get_text() == ""


def test_curves_intervals_and_both_axes_are_drawn():
    picture = line_chart(
        [
            Curve("score", [(0, 0.2), (1, 0.4)], low=(0.1, 0.3), high=(0.3, 0.6)),
            Curve("cosine", [(0, 0.9), (1, 0.99)], right=True),
            Curve("band", [(0, 0.2), (1, 0.1)], low=(0.1, 0.1), high=(0.3, 0.2), band=True),
        ],
        title="T",
        x_label="step",
        y_label="score",
        right_label="cosine",
        size=(700, 400),
    )
    assert picture.size == (700, 400)
    assert picture.mode == "RGB"
    assert {rgb(colour) for colour in charts.COLOURS[:3]} <= colours(picture)
    bare = line_chart([Curve("score", [(0, 0.2), (1, 0.4)])], size=(700, 400))
    assert colours(bare).isdisjoint({rgb(colour) for colour in charts.COLOURS[1:3]})


def test_intervals_lie_inside_the_axis(monkeypatch):
    curve = Curve("a", [(0, 0.5)], low=(0.1,), high=(0.9,))
    low, high = figure_of(monkeypatch, [curve]).axes[0].get_ylim()
    assert low < 0.1
    assert high > 0.9


def test_more_curves_than_colours_differ_by_their_dashes(monkeypatch):
    curves = [Curve(str(i), [(0.0, i), (1.0, i + 1.0)]) for i in range(10)]
    lines = figure_of(monkeypatch, curves).axes[0].lines
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 10
    assert lines[8].get_color() == lines[0].get_color()
    assert lines[8].get_linestyle() == "--"


def test_points_without_a_line():
    points = [(0, 0.0), (1, 1.0)]
    joined, single = (line_chart([Curve("a", points, line=line)]) for line in (True, False))
    blue = [
        (np.asarray(picture) == rgb(charts.COLOURS[0])).all(-1).sum()
        for picture in (joined, single)
    ]
    assert blue[0] > 3 * blue[1] > 0


def test_names_cover_nothing_and_stay_on_the_page(monkeypatch):
    """Fourteen names for points that nearly coincide, beside a line."""
    points = [(1.5 + 0.001 * i, 0.78 + 0.0005 * (i % 3)) for i in range(14)]
    names = [f"technique number {i}" for i in range(14)]
    sweep = Curve("sweep", [(1, 0.74), (1.5, 0.78), (7.5, 0.64)])
    curves = [sweep, Curve("rules", points, names=names, line=False)]
    figure = figure_of(monkeypatch, curves, size=(1200, 760), log="x")
    texts = {text.get_text(): text for text in figure.texts if text.get_text() in names}
    assert set(texts) == set(names)
    boxes = [text.get_window_extent() for text in texts.values()]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= 1200
        assert 0 <= box.y0 < box.y1 <= 760
        # a line of 9.5 point is 13 pixels high and stands in a place of 15
        assert not any(box.overlaps(other.padded(-1)) for other in boxes[:i])
        for x, y in figure.axes[0].transData.transform(points):
            assert not box.padded(-1).contains(x, y)


def test_a_logarithmic_axis_has_plain_ticks(monkeypatch):
    ax = figure_of(monkeypatch, [Curve("loss", [(0, 0.02), (9, 4.0)])], log="y").axes[0]
    assert ax.get_yscale() == "log"
    assert {text.get_text() for text in ax.get_yticklabels()} >= {"0.02", "0.1", "0.5", "1"}


def test_pictures_below_each_other():
    page = stacked([Image.new("RGB", (20, n), "red") for n in (3, 4)])
    assert page.size == (20, 7)
    assert colours(page) == {(255, 0, 0)}


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="at least one curve"):
        line_chart([Curve("none", [])])
    with pytest.raises(ValueError, match="smallest is 0"):
        line_chart([Curve("a", [(1, 0.0), (2, 1.0)])], log="y")


def test_the_same_chart_has_the_same_pixels_and_no_window_is_opened():
    code = (
        "import sys; from diffalign.drawing.charts import Curve, line_chart;"
        "assert not any(name.startswith('matplotlib') for name in sys.modules);"
        "line_chart([Curve('a', [(0, 1), (1, 2)])]);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    curve = Curve("a", [(0, 1.0), (1, 2.0)])
    assert line_chart([curve]).tobytes() == line_chart([curve]).tobytes()
