"""Controls of a technique's options, made from what the options say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import FormComponent

from diffalign.core.option import CALL, REQUIRED, Option, options_of
from diffalign.core.registry import make
from diffalign.core.technique import Technique
from diffalign.core.types import Keywords
from diffalign.core.values import alternatives, value_text

Values = Mapping[FormComponent, Any]
"""Component -> what it holds."""


@dataclass(frozen=True, slots=True)
class Control:
    """One option of one technique on the page."""

    technique: str
    option: str
    # what the control shows before anybody touches it
    initial: object
    component: FormComponent


def controls_of(name: str, cls: type, resolved: Technique) -> list[Control]:
    """Controls for the options of the technique ``name``, drawn where this is called.

    ``resolved``: the technique with the options that it has on the page's model. The guidance scale
    of the call is the page's own, and objects and tensors have no control.
    """
    controls = []
    for option, spec in options_of(cls).items():
        if spec.source != CALL and spec.saved == "value":
            initial, component = _component(spec, getattr(resolved, option))
            controls.append(Control(name, option, initial, component))
    return controls


def _component(spec: Option, value: Any) -> tuple[object, FormComponent]:
    """What is shown at first, and the control: a range is a slider, choices a list, a flag a box,
    everything else a text as the command line reads it."""
    words: Keywords = {"label": spec.name.replace("_", " ")}
    words["info"] = "; ".join(filter(None, (spec.meaning, spec.range)))
    kinds = [kind for kind in alternatives(spec.annotation) if kind is not type(None)]
    if value in spec.choices:
        return value, gr.Dropdown(list(spec.choices), value=value, **words)
    if kinds == [bool] and value is not None:
        return value, gr.Checkbox(value, **words)
    numeric = isinstance(value, int | float) and set(kinds) <= {int, float}
    if numeric and spec.span and spec.span[0] <= value <= spec.span[1]:
        low, high = spec.span
        step = 1 if kinds == [int] else (high - low) / 100
        return value, gr.Slider(low, high, value=value, step=step, **words)
    text = value_text(value)
    return text, gr.Textbox(text, **words)


def is_ready(cls: type) -> bool:
    """Whether a technique can be made without naming an option."""
    return all(spec.default is not REQUIRED for spec in options_of(cls).values())


def technique_of(name: str, controls: list[Control], values: Values) -> Technique:
    """The technique with the options that the user changed; the others stay the model's own.

    ``values``: component -> its value. Raises ValueError for a bad value.
    """
    changed = {
        control.option: values[control.component]
        for control in controls
        if control.technique == name and values[control.component] != control.initial
    }
    return make(name, changed)
