"""The comparison on the embedded model, and the page that holds them."""

import gradio as gr
import pytest

import diffalign as da
from diffalign.app import compare, page
from diffalign.core.registry import parse
from diffalign.generate.seeds import seed_of


@pytest.fixture(scope="module")
def comparison():
    return compare.Comparison()


def columns(*techniques, scale=3.0):
    return {f"CFG {scale:g}": (), "techniques": techniques}


def test_draw_gives_sheet_report_and_plot(comparison):
    ticks = []
    sheet, report, plot = comparison.draw(
        "a photo of a dog",
        columns(da.IntervalCFG()),
        3.0,
        4,
        0,
        progress=lambda done, desc: ticks.append((done, desc)),
    )
    assert sheet.width > 2 * 128
    assert report.startswith(
        "StableDiffusionPipeline: guided 4 of 4 steps, 8 NFE per image (CFG: 8)"
    )
    assert plot is not None
    assert ticks == [((i, 4), name) for name in ("CFG 3", "techniques") for i in (1, 2, 3, 4)]


def test_an_image_is_the_command_lines(comparison, monkeypatch):
    made, jobs = compare.samples, []

    def watched(pipe, techniques, todo, **options):
        jobs.extend(todo)
        return made(pipe, techniques, todo, **options)

    monkeypatch.setattr(compare, "samples", watched)
    comparison.draw("a dog", columns(), 3.0, 2, 7)
    assert [job.seed for job in jobs] == 2 * [seed_of("a dog", 0, base=7)]


def test_the_negative_prompt_reaches_nag(comparison):
    arguments = ("a photo of a dog and a cat", columns(da.NAG(), scale=1.0), 1.0, 4, 0)
    plain, without, _ = comparison.draw(*arguments)
    sheet, report, _ = comparison.draw(*arguments, negative="a photo of a cat")
    assert "negative text from the empty prompt" in without
    assert "negative text from negative_prompt of the call" in report
    assert sheet.tobytes() != plain.tobytes()


def test_nothing_is_left_behind(comparison):
    before = type(comparison.pipe), type(comparison.pipe.unet)
    tools = parse("interval-cfg:stop=0.5+pladis")
    _, report, _ = comparison.draw("three cats", columns(*tools), 3.0, 4, 0)
    assert "guided 2 of 4 steps" in report
    assert "pladis" in report
    assert (type(comparison.pipe), type(comparison.pipe.unet)) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": 1e30}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"steps": 3.7}, "Steps must be a whole number"),
        ({"columns": {"two": (da.CFG(2.0), da.APG(2.0))}}, "only one"),
    ],
)
def test_bad_input_is_one_line(comparison, change, words):
    arguments = {"prompt": "a dog", "columns": columns(), "scale": 3.0, "steps": 2, "seed": 0}
    with pytest.raises(gr.Error, match=words) as caught:
        comparison.draw(**arguments | change)
    assert not caught.value.print_exception


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (["cfg"], "nagg", "Nearest: nag"),
        ([], "", "No technique is chosen"),
        (None, None, "No technique is chosen"),
    ],
)
def test_bad_techniques_are_one_line(names, text, words):
    with pytest.raises(gr.Error, match=words) as caught:
        compare.columns_of(names, text, 3.0)
    assert not caught.value.print_exception


def test_the_text_form_wins():
    assert compare.columns_of(["cfg"], " apg:eta=0.5 ", 3.0) == {
        "CFG 3": (),
        "apg:eta=0.5": (da.APG(eta=0.5),),
    }


@pytest.mark.parametrize("when", [1, 5])
def test_stop_ends_the_drawing_and_the_next_one_runs(comparison, when):
    """In the plain column and in the one with techniques."""
    ticks = []

    def progress(done, desc):
        ticks.append(done)
        if len(ticks) == when:
            comparison.stop()

    with pytest.raises(gr.Error, match="Stopped"):
        comparison.draw("a dog", columns(da.APG()), 3.0, 4, 0, progress=progress)
    assert len(ticks) == when
    assert comparison.draw("a dog", columns(da.APG()), 3.0, 2, 0)[2] is not None


def test_page_lists_what_works(comparison):
    built = page.build(comparison)
    labels = {getattr(block, "label", None) for block in built.blocks.values()}
    assert {"Prompt", "Guidance scale", "What it did and what it cost", "Compare"} <= labels
    assert {"adaptive-guidance", "nag", "pladis"} <= set(comparison.classes)
    assert "linear-ag" in comparison.classes  # its policies for this model ship
