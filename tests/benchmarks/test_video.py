"""Rows of the video benchmark against numbers worked by hand."""

import pytest


@pytest.fixture(scope="module")
def video(benchmark_module):
    return benchmark_module("video")


def record(rows, seconds, likeness, judge, audit):
    return {
        "rows": rows,
        "seconds": seconds,
        "likeness": likeness,
        "judge": judge,
        "audit": audit,
    }


TAGS = ["object", "motion"]
TREE = [
    [record(10, 1.0, 0.5, True, True), record(20, 3.0, 0.7, False, True)],
    [record(30, 2.0, 0.9, True, False), record(20, 9.0, 0.9, True, False)],
]
LINEAR = [
    [record(100, 10.0, 0.8, True, True), record(100, 20.0, 0.8, True, True)],
    [record(100, 15.0, 0.8, True, True), record(100, 25.0, 0.8, True, True)],
]


def test_a_row_by_hand(video):
    row = video.row_of("tree 6-2-1, keep 2", TREE, LINEAR, TAGS)
    assert row["rows"] == pytest.approx(20)
    # the median of 1, 2, 3 and 9, and that of 10, 15, 20 and 25
    assert row["seconds"] == pytest.approx(2.5)
    assert row["share of seconds"] == pytest.approx(2.5 / 17.5)
    assert row["share of rows"] == pytest.approx(0.2)
    assert row["likeness"].value == pytest.approx(0.75)
    assert row["judge"].value == pytest.approx(0.75)
    assert row["beside"] == video.BASE
    assert row["to beside"].value == pytest.approx((-0.2 + 0.1) / 2)
    # shares of 1 and 0 against 1 and 1
    assert row["audit to beside"].value == pytest.approx(-0.5)
    assert (row["object"], row["motion"]) == (1.0, 0.0)
    assert set(row) <= {"method", *video.COLUMNS}


def test_the_page_says_what_the_rows_do(video):
    from pages import video as page
    from results import Result

    names = ("device", "versions", "commit", "command")
    where = dict.fromkeys(names, "x") | {"versions": {"torch": "2", "diffusers": "0"}}
    options = {"model": "a/emoji-video", "seeds": 2, "steps": 10, "scale": 3.0}
    rows = [video.row_of(video.BASE, LINEAR, LINEAR, TAGS)]
    rows += [video.row_of("tree 6-2-1, keep 2", TREE, LINEAR, TAGS)]
    text = page(Result(rows, video.COLUMNS, {"prompts": 2}, options, where))
    assert "# Videos of emoji-video: 2 sentences x 2, 10 steps a chunk, scale 3" in text
    assert (
        "tree 6-2-1, keep 2: does not reach the mean likeness of linear search with 20 and does "
        "not reach its share of right clips by the audit judge, with at most a third of its rows "
        "and at most half of its seconds." in text
    )


def test_every_way_can_be_read(video):
    from diffalign.alignment.order import method_of

    for way in video.WAYS.values():
        assert method_of(way.method).chunks != "never"
        assert way.beside in video.WAYS
