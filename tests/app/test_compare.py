"""The comparison on the embedded model, its controls, and the page that holds them."""

from dataclasses import dataclass

import gradio as gr
import pytest

import diffalign as da
from diffalign.app import compare, controls, page
from diffalign.core import Technique, option
from diffalign.core.option import options_of
from diffalign.core.registry import make, parse
from diffalign.core.seeds import seed_of


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
        compare.columns_of(names, text, 3.0, [], {})
    assert not caught.value.print_exception


def test_the_text_form_wins():
    assert compare.columns_of(["cfg"], " apg:eta=0.5 ", 3.0, [], {}) == {
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


@pytest.fixture(scope="module")
def all_controls(comparison):
    with gr.Blocks():
        return {
            name: controls.controls_of(name, cls, comparison.resolved(name))
            for name, cls in comparison.classes.items()
        }


def test_every_option_that_can_be_written_has_a_control(comparison, all_controls):
    for name, cls in comparison.classes.items():
        expected = [
            option
            for option, spec in options_of(cls).items()
            if spec.source != "call" and spec.saved == "value"
        ]
        assert [control.option for control in all_controls[name]] == expected
        for control in all_controls[name]:
            spec = options_of(cls)[control.option]
            assert spec.meaning in control.component.info


def test_untouched_controls_leave_every_option_to_the_model(comparison, all_controls):
    for name, cls in comparison.classes.items():
        values = {control.component: control.initial for control in all_controls[name]}
        assert controls.technique_of(name, all_controls[name], values) == cls()


def kind_of(all_controls, name, option):
    (control,) = (control for control in all_controls[name] if control.option == option)
    return control


def test_ranges_are_sliders_choices_are_lists_and_flags_are_boxes(all_controls):
    stop = kind_of(all_controls, "interval-cfg", "stop")
    assert isinstance(stop.component, gr.Slider)
    assert (stop.component.minimum, stop.component.maximum, stop.initial) == (0.0, 1.0, 1.0)
    space = kind_of(all_controls, "adaptive-guidance", "space")
    assert isinstance(space.component, gr.Dropdown)
    assert space.initial == "x0"  # what is looked up for this model
    window = kind_of(all_controls, "interval-cfg", "sigma")
    assert isinstance(window.component, gr.Textbox)
    assert window.initial == "none"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("interval-cfg", "stop", 0.5),
        ("interval-cfg", "sigma", "(0.5,inf)"),
        ("adaptive-guidance", "space", "eps"),
    ],
)
def test_a_touched_control_sets_its_option(all_controls, name, option, value):
    values = {control.component: control.initial for control in all_controls[name]}
    values[kind_of(all_controls, name, option).component] = value
    technique = controls.technique_of(name, all_controls[name], values)
    assert technique == make(name, {option: value})


@dataclass(frozen=True)
class Flagged(Technique):
    """A technique with every kind of option that has no slider."""

    flag: bool = option(True, "whether it acts")
    count: int = option(3, "how often", low=1, usual=(1, 8))
    cap: float = option(9.0, "at most", usual=(0.0, 1.0))
    embeds: object = option(None, "tensors", saved="tensors")


def test_flags_are_boxes_and_a_value_beyond_its_slider_is_a_text():
    with gr.Blocks():
        drawn = controls.controls_of("flagged", Flagged, Flagged())
    assert [(control.option, type(control.component)) for control in drawn] == [
        ("flag", gr.Checkbox),
        ("count", gr.Slider),
        ("cap", gr.Textbox),
    ]
    assert drawn[1].component.step == 1


def test_page_lists_what_works(comparison):
    built = page.build(comparison)
    labels = {getattr(block, "label", None) for block in built.blocks.values()}
    assert {"Prompt", "Guidance scale", "What it did and what it cost", "Compare"} <= labels
    assert {"adaptive-guidance", "nag", "pladis"} <= set(comparison.classes)
    assert "linear-ag" in comparison.classes  # its policies for this model ship
