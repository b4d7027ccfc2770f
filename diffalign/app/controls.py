"""Controls of the options of techniques and methods, made from what the options say themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr
from gradio.components import FormComponent

from diffalign.app.bounds import short
from diffalign.core.option import CALL, REQUIRED, Option, options_of
from diffalign.core.registry import Registry
from diffalign.core.types import Keywords
from diffalign.core.values import alternatives, value_text

T = TypeVar("T")
Values = Mapping[FormComponent, Any]
"""Component -> what it holds."""
MODEL = "from the model"
"""What stands in a control whose option is looked up for the model."""


@dataclass(frozen=True, slots=True)
class Control:
    """One option of one technique or method on the page."""

    # registered name of the technique or method
    item: str
    option: Option
    component: FormComponent
    # what the control holds before anybody touches it; the option is then left out
    initial: object

    @property
    def key(self) -> str:
        """Its name in the address of the page."""
        return f"{self.item}.{self.option.name}"

    @property
    def automatic(self) -> bool:
        """Whether the option is looked up for the model."""
        return bool(self.option.source)


@dataclass(frozen=True, slots=True)
class Panel:
    """The controls of several techniques or methods; those of the chosen ones are shown."""

    controls: tuple[Control, ...]
    # name -> the group of its controls
    groups: dict[str, gr.Accordion]

    def options(self, item: str, values: Values) -> dict[str, object]:
        """The options that were touched. Raises: ``gr.Error`` for a text that is too long."""
        changed = {}
        for control in self.controls:
            value = values[control.component]
            if control.item == item and value != control.initial:
                if isinstance(value, str):
                    value = short(value, f"{item}: {control.option.name}")
                changed[control.option.name] = value
        return changed

    def build(self, registry: Registry[T], item: str, values: Values) -> T:
        """The technique or method as the controls say. Raises: ValueError for a bad value."""
        return registry.build(item, self.options(item, values))

    def shown(self, names: Sequence[str]) -> list[gr.Accordion]:
        """Updates of all groups that show those of ``names``."""
        return [gr.Accordion(visible=name in names) for name in self.groups]

    def defaults(self, known: Mapping[str, object]) -> dict[FormComponent, FormComponent]:
        """Updates that say what "from the model" is. ``known``: name -> resolved technique."""
        updates = {}
        for control in self.controls:
            if control.automatic and control.item in known:
                value = getattr(known[control.item], control.option.name)
                updates[control.component] = _with_default(control, value_text(value))
        return updates


def panel(
    items: Mapping[str, Callable[..., object]], shown: Sequence[str], without: Sequence[str] = ()
) -> Panel:
    """One group of controls for each of ``items``, drawn where this is called. ``without``: options
    that the tab has fields of its own for."""
    groups: dict[str, gr.Accordion] = {}
    controls: list[Control] = []
    for name, cls in items.items():
        specs = [spec for spec in options_of(cls).values() if has_control(spec)]
        specs = [spec for spec in specs if spec.name not in without]
        if not specs:
            continue
        with (
            gr.Accordion(f"Options of {name}", open=False, visible=name in shown) as group,
            gr.Row(),
        ):
            for spec in specs:
                component, initial = _component(spec, name)
                controls.append(Control(name, spec, component, initial))
        groups[name] = group
    return Panel(tuple(controls), groups)


def has_control(spec: Option) -> bool:
    """Whether an option can be written: objects and tensors cannot, and the guidance scale of the
    call is the page's own."""
    return spec.source != CALL and spec.saved == "value"


def is_ready(cls: Callable[..., object]) -> bool:
    """Whether a technique or method can be made without naming an option."""
    return all(spec.default is not REQUIRED for spec in options_of(cls).values())


def _component(spec: Option, item: str) -> tuple[FormComponent, object]:
    """The control and what it holds at first: a range is a slider, choices a list, a flag a box,
    everything else a text as the command line reads it."""
    words: Keywords = {"label": spec.name.replace("_", " "), "min_width": 220}
    words["info"] = "; ".join(filter(None, (spec.meaning, spec.range)))
    words["elem_classes"] = [f"option-{item}-{spec.name}"]
    kinds = [kind for kind in alternatives(spec.annotation) if kind is not type(None)]
    empty = MODEL if spec.source else "none"
    unset = bool(spec.source) or spec.default is None
    if spec.choices:
        first = [] if not unset else [empty]
        start = empty if unset else value_text(spec.default)
        return gr.Dropdown([*first, *map(value_text, spec.choices)], value=start, **words), start
    if kinds == [bool]:
        if not unset:
            return gr.Checkbox(bool(spec.default), **words), spec.default
        return gr.Dropdown([empty, "true", "false"], value=empty, **words), empty
    if set(kinds) <= {int, float} and not (unset or spec.infinite):
        return _number(spec, kinds == [int], spec.default, words)
    text = "" if unset else value_text(spec.default)
    return gr.Textbox(text, placeholder=empty, max_length=300, **words), text


def _number(
    spec: Option, integer: bool, default: float, words: Keywords
) -> tuple[FormComponent, object]:
    """A slider where the default lies in a known range, else a number. One that may be left empty
    is a text: a number of the browser is never empty."""
    if spec.span and spec.span[0] <= default <= spec.span[1]:
        low, high = spec.span
        step = 1 if integer else (high - low) / 100
        return gr.Slider(low, high, value=default, step=step, **words), default
    ends = [end if math.isfinite(end) else None for end in (spec.low, spec.high)]
    words |= {"minimum": ends[0], "maximum": ends[1]}
    words |= {"precision": 0, "step": 1} if integer else {"step": 0.1}
    return gr.Number(default, **words), default


def _with_default(control: Control, text: str) -> FormComponent:
    label = f"{MODEL}: {text}"
    if isinstance(control.component, gr.Dropdown):
        texts = [str(value) for _, value in control.component.choices if value != MODEL]
        return gr.Dropdown(choices=[(label, MODEL), *((text, text) for text in texts)])
    return gr.Textbox(placeholder=label)
