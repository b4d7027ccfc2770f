"""The demo's action on the embedded model, and the page it is built into."""

import gradio as gr
import pytest

from diffalign.app.ui import Demo, build


@pytest.fixture(scope="module")
def demo():
    return Demo()


def test_draw_gives_sheet_report_and_plot(demo):
    ticks = []
    sheet, report, plot = demo.draw(
        "a photo of a dog",
        ["interval-cfg"],
        "",
        3.0,
        4,
        0,
        progress=lambda done, desc: ticks.append(done),
    )
    assert sheet.width > 2 * 128
    assert report.startswith(
        "StableDiffusionPipeline: guided 4 of 4 steps, 8 NFE per image (CFG: 8)"
    )
    assert plot is not None
    assert ticks == [(i, 4) for i in (1, 2, 3, 4)] * 2


def test_the_negative_prompt_reaches_nag(demo):
    given = {
        "prompt": "a photo of a dog and a cat",
        "names": ["nag"],
        "text": "",
        "scale": 1.0,
        "steps": 4,
        "seed": 0,
    }
    plain, without, _ = demo.draw(**given)
    sheet, report, _ = demo.draw(**given, negative="a photo of a cat")
    assert "negative text from the empty prompt" in without
    assert "negative text from negative_prompt of the call" in report
    assert sheet.tobytes() != plain.tobytes()


def test_text_form_wins_and_nothing_is_left_behind(demo):
    before = type(demo.pipe), type(demo.pipe.unet)
    _, report, _ = demo.draw(
        "three cats", ["adaptive-guidance"], "interval-cfg:stop=0.5+pladis", 3.0, 4, 0
    )
    assert "guided 2 of 4 steps" in report
    assert "pladis" in report
    assert (type(demo.pipe), type(demo.pipe.unet)) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"text": "nagg"}, "Nearest: nag"),
        ({"names": []}, "No technique is chosen"),
        ({"names": None, "text": None}, "No technique is chosen"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": 1e30}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"steps": 3.7}, "Steps must be a whole number"),
    ],
)
def test_bad_input_is_one_line(demo, change, said):
    given = {
        "prompt": "a dog",
        "names": ["cfg"],
        "text": "",
        "scale": 3.0,
        "steps": 2,
        "seed": 0,
    } | change
    with pytest.raises(gr.Error, match=said) as caught:
        demo.draw(**given)
    assert not caught.value.print_exception


@pytest.mark.parametrize("when", [1, 5])
def test_stop_ends_the_drawing_and_the_next_one_runs(demo, when):
    """In the plain column and in the one with techniques."""
    ticks = []

    def progress(done, desc):
        ticks.append(done)
        if len(ticks) == when:
            demo.stop()

    with pytest.raises(gr.Error, match="Stopped"):
        demo.draw("a dog", ["apg"], "", 3.0, 4, 0, progress=progress)
    assert len(ticks) == when
    assert demo.draw("a dog", ["apg"], "", 3.0, 2, 0)[2] is not None


def test_page_lists_what_works(demo):
    page = build(demo)
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Prompt", "Guidance scale", "What it did and what it cost"} <= labels
    assert {"adaptive-guidance", "nag", "pladis"} <= set(demo.choices)
    assert "linear-ag" in demo.choices  # its policies for this model ship
