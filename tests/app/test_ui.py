"""The demo's action on the embedded model, and the page it is built into."""

import gradio as gr
import pytest

from diffalign.app.ui import Demo, build


@pytest.fixture(scope="module")
def demo():
    return Demo()


def test_draw_gives_sheet_report_and_plot(demo):
    ticks = []
    sheet, report, plot = demo.draw("a photo of a dog", ["interval-cfg"], "", 3.0, 4, 0, progress=lambda done, desc: ticks.append(done))
    assert sheet.width > 2 * 128
    assert report.startswith("StableDiffusionPipeline: guided 4 of 4 steps, 8 NFE per image (CFG: 8)")
    assert plot is not None
    assert ticks == [(i, 4) for i in (1, 2, 3, 4)] * 2


def test_text_form_wins_and_nothing_is_left_behind(demo):
    before = type(demo.pipe), type(demo.pipe.unet)
    _, report, _ = demo.draw("three cats", ["adaptive-guidance"], "interval-cfg:stop=0.5+pladis", 3.0, 4, 0)
    assert "guided 2 of 4 steps" in report
    assert "pladis" in report
    assert (type(demo.pipe), type(demo.pipe.unet)) == before


@pytest.mark.parametrize(("prompt", "text", "said"), [(" ", "", "prompt is empty"), ("a dog", "nagg", "Nearest: nag")])
def test_bad_input_is_one_line(demo, prompt, text, said):
    with pytest.raises(gr.Error, match=said):
        demo.draw(prompt, [], text, 3.0, 2, 0)


def test_page_lists_what_works(demo):
    page = build(demo)
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Prompt", "Guidance scale", "What it did and what it cost"} <= labels
    assert {"adaptive-guidance", "nag", "pladis"} <= set(demo.choices)
    assert "linear-ag" in demo.choices  # its policies for this model ship
