"""Settings in the address: what goes in comes back, and nothing else comes in."""

import json

import gradio as gr
import pytest

from diffalign.app.links import Fields, text_of


@pytest.fixture(scope="module")
def fields():
    with gr.Blocks():
        return Fields(
            "tab",
            {
                "prompt": gr.Textbox("a dog", max_length=10),
                "scale": gr.Slider(1, 30, value=1.5),
                "steps": gr.Slider(1, 100, value=20, step=1),
                "cap": gr.Number(None, minimum=0),
                "flag": gr.Checkbox(True),
                "model": gr.Dropdown(["one", "two"], value="one"),
                "names": gr.Dropdown(["a", "b", "c"], value=["a"], multiselect=True, max_choices=2),
            },
        )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("prompt", "<b>é</b>", "<b>é</b>"),
        ("scale", "2.5", 2.5),
        ("steps", "4", 4),
        ("cap", "", None),
        ("cap", "3", 3),
        ("flag", "false", False),
        ("model", "two", "two"),
        ("names", '["a","c"]', ["a", "c"]),
        ("names", "[]", []),
    ],
)
def test_a_value_comes_back(fields, name, text, value):
    assert fields.read({name: text}) == ({fields.components[name]: value}, [])
    assert text_of(value) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompt", "a" * 11),
        ("scale", "nan"),
        ("scale", "1e9"),
        ("scale", ""),
        ("scale", "two"),
        ("steps", "0"),
        ("cap", "-1"),
        ("cap", "inf"),
        ("flag", "maybe"),
        ("model", "../../etc/passwd"),
        ("names", "a"),
        ("names", "{}"),
        ("names", '["a","b","c"]'),
        ("names", '["d"]'),
        ("names", "[[1]]"),
    ],
)
def test_what_a_field_cannot_hold_is_left_out(fields, name, text):
    assert fields.read({name: text, "stranger": "1"}) == ({}, [name])


def test_the_script_knows_names_and_first_values(fields):
    script = fields.script()
    assert json.dumps(list(fields.components)) in script
    assert json.dumps(["a dog", "1.5", "20", "", "true", "one", '["a"]']) in script


def test_every_field_of_the_page_is_in_its_first_state(shelf):
    """What stands in no address is what the page shows at first: no value is written by itself."""
    from diffalign.app import page
    from diffalign.app.desk import Desk

    desk = Desk()
    with gr.Blocks():
        for _, draw in page.TABS:
            tab = draw(shelf, desk)
            for name, component in tab.components.items():
                if component.value is not None and tab.name != "models":
                    values, unusable = tab.read({name: text_of(component.value)})
                    assert not unusable, name
                    assert values[component] == component.value
    desk.close()
