"""Controls are made from options: what kind, what they hold, and what they make of it."""

from dataclasses import dataclass

import gradio as gr
import pytest

from diffalign.app import controls
from diffalign.app.compare import classes
from diffalign.core import Technique, auto, option
from diffalign.core.option import options_of
from diffalign.core.registry import METHODS, TECHNIQUES, make


@pytest.fixture(scope="module")
def panel():
    with gr.Blocks():
        return controls.panel(classes(), ["apg"])


def control(panel, item, name):
    (match,) = (c for c in panel.controls if (c.item, c.option.name) == (item, name))
    return match


def values_of(panel, **changed):
    return {c.component: changed.get(c.key.replace(".", "__"), c.initial) for c in panel.controls}


def test_every_option_that_can_be_written_has_a_control(panel):
    for name, cls in classes().items():
        expected = [o for o, spec in options_of(cls).items() if controls.has_control(spec)]
        assert [c.option.name for c in panel.controls if c.item == name] == expected
    for c in panel.controls:
        assert c.option.meaning in c.component.info


def test_methods_have_controls_too():
    items = {name: cls for name, cls in METHODS.all().items() if controls.is_ready(cls)}
    with gr.Blocks():
        methods = controls.panel(items, [])
    assert {c.item for c in methods.controls} == set(items)
    for name, cls in items.items():
        assert methods.build(METHODS, name, values_of(methods)) == cls()


def test_untouched_controls_leave_every_option_to_the_model(panel):
    for name, cls in classes().items():
        assert panel.build(TECHNIQUES, name, values_of(panel)) == cls()


def test_ranges_are_sliders_choices_are_lists_and_what_is_looked_up_is_empty(panel):
    stop = control(panel, "interval-cfg", "stop")
    assert isinstance(stop.component, gr.Slider)
    assert (stop.component.minimum, stop.component.maximum, stop.initial) == (0.0, 1.0, 1.0)
    space = control(panel, "adaptive-guidance", "space")
    assert isinstance(space.component, gr.Dropdown)
    assert space.initial == "from the model"
    cap = control(panel, "apg", "cap")
    assert isinstance(cap.component, gr.Textbox)
    assert (cap.initial, cap.component.placeholder) == ("", "from the model")
    high = control(panel, "fdg", "high")
    assert (high.initial, high.component.placeholder) == ("", "none")
    window = control(panel, "interval-cfg", "sigma")
    assert isinstance(window.component, gr.Textbox)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("interval-cfg", "stop", 0.5),
        ("interval-cfg", "sigma", "(0.5,inf)"),
        ("adaptive-guidance", "space", "eps"),
        ("apg", "cap", "inf"),
        ("nag", "tau", "4"),
        ("pladis", "alpha", "2"),
    ],
)
def test_a_touched_control_sets_its_option(panel, name, option, value):
    values = values_of(panel, **{f"{name}__{option}": value})
    assert panel.build(TECHNIQUES, name, values) == make(name, {option: value})


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("interval-cfg", "sigma", "x" * 301, gr.Error),
        ("interval-cfg", "sigma", "(a,b)", ValueError),
        ("nag", "tau", "nan", ValueError),
        ("nag", "tau", "-1e300", ValueError),
        ("s2-guidance", "seed", float("nan"), ValueError),
        ("apg", "cap", "nan", ValueError),
    ],
)
def test_a_bad_value_is_refused(panel, name, option, value, error):
    with pytest.raises(error, match=f"{option}|letters"):
        panel.build(TECHNIQUES, name, values_of(panel, **{f"{name}__{option}": value}))


def test_the_groups_of_chosen_techniques_are_shown(panel):
    shown = [
        name for name, update in zip(panel.groups, panel.shown(["nag", "apg"])) if update.visible
    ]
    assert sorted(shown) == ["apg", "nag"]
    assert "tcfg" not in panel.groups  # it has the call's scale alone


def test_what_from_the_model_means_is_said(panel, opened):
    updates = panel.defaults(opened.resolved(classes()))
    assert updates[control(panel, "apg", "cap").component].placeholder.startswith(
        "from the model: "
    )
    space = updates[control(panel, "adaptive-guidance", "space").component]
    assert space.choices[0] == ("from the model: x0", "from the model")


@dataclass(frozen=True)
class Flagged(Technique):
    """A technique with every kind of option that has no slider."""

    flag: bool = option(True, "whether it acts")
    maybe: bool = auto("flagged/maybe", "whether it may")
    count: int = option(3, "how often", low=1, usual=(1, 8))
    cap: float = option(9.0, "at most", usual=(0.0, 1.0))
    embeds: object = option(None, "tensors", saved="tensors")


def test_flags_are_boxes_and_a_value_beyond_its_slider_is_a_number():
    with gr.Blocks():
        drawn = controls.panel({"flagged": Flagged}, [], without=("none",)).controls
    assert [(c.option.name, type(c.component)) for c in drawn] == [
        ("flag", gr.Checkbox),
        ("maybe", gr.Dropdown),
        ("count", gr.Slider),
        ("cap", gr.Number),
    ]
    assert drawn[2].component.step == 1
    with gr.Blocks():
        rest = controls.panel({"flagged": Flagged}, [], without=("flag", "maybe")).controls
    assert [c.option.name for c in rest] == ["count", "cap"]
