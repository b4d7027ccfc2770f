"""What a field may hold."""

import math

import gradio as gr
import pytest

from diffalign.app import bounds


def test_what_is_usable_comes_back():
    assert bounds.prompt_of("  a dog ") == "a dog"
    assert bounds.whole(4.0, "Steps", 1, 100) == 4
    assert bounds.number(1.5, "Scale", 1.0, 30.0) == 1.5


@pytest.mark.parametrize("value", [0, 101, 3.5, math.nan, math.inf, 1e300, None, "4"])
def test_a_number_outside_its_range_is_refused(value):
    with pytest.raises(gr.Error, match="must be a whole number from 1 to 100"):
        bounds.whole(value, "Steps", 1, 100)


@pytest.mark.parametrize("value", [0.5, 31.0, math.nan, -math.inf, None, "2"])
def test_a_scale_outside_its_range_is_refused(value):
    with pytest.raises(gr.Error, match="from 1 to 30"):
        bounds.number(value, "The guidance scale", 1.0, bounds.SCALE)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), (None, "empty"), ("a" * 501, "may have 500 letters; got 501")],
)
def test_a_prompt_is_a_text_of_some_length(text, words):
    with pytest.raises(gr.Error, match=words):
        bounds.prompt_of(text)


def test_a_refusal_is_plain_text_of_one_line_without_a_traceback():
    error = bounds.refusal("no\n <img src=x onerror=alert(1)>" + "a" * 1000)
    assert error.message.startswith("no &lt;img src=x onerror=alert(1)&gt;")
    assert len(error.message) < 700
    assert not error.print_exception
