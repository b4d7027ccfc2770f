"""The settings of the page in its address: a link or a reload brings them back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import gradio as gr
from gradio.components import FormComponent

from diffalign.app.bounds import TEXT


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one tab that its address holds."""

    # of the tab
    name: str
    # name in the address -> field
    components: Mapping[str, FormComponent]

    def script(self) -> str:
        """JavaScript that writes what differs from the first state of the page into the address."""
        names = list(self.components)
        usual = [text_of(component.value) for component in self.components.values()]
        return SCRIPT % (json.dumps(names), json.dumps(usual), json.dumps(self.name))

    def watch(self, tab: gr.Tab) -> None:
        """Keep the address as the fields are while somebody works in the tab."""
        fields = list(self.components.values())
        events = [tab.select, *(field.change for field in fields)]  # type: ignore[attr-defined]
        gr.on(
            events,
            None,
            fields,
            None,
            js=self.script(),
            show_progress="hidden",
            api_visibility="private",
        )

    def read(self, query: Mapping[str, str]) -> tuple[dict[FormComponent, object], list[str]]:
        """Values of an address, and the names of those that no field can hold."""
        values: dict[FormComponent, object] = {}
        unusable = []
        for name, component in self.components.items():
            if name in query:
                try:
                    values[component] = value_of(query[name], component)
                except ValueError:
                    unusable.append(name)
        return values, unusable


SCRIPT = """(...values) => {
  const names = %s, usual = %s;
  const query = new URLSearchParams({tab: %s});
  names.forEach((name, i) => {
    const value = values[i];
    const text = value === null || value === undefined ? ""
      : Array.isArray(value) ? JSON.stringify(value) : String(value);
    if (text !== usual[i]) query.set(name, text);
  });
  window.history.replaceState(window.history.state, "", "?" + query.toString());
}"""


def text_of(value: object) -> str:
    """A value as JavaScript writes it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, int | float) else str(value)


def value_of(text: str, component: FormComponent) -> object:
    """A text of the address as the field's value. Raises: ValueError for what it cannot hold."""
    if isinstance(component, gr.Checkbox):
        return {"true": True, "false": False}[text] if text in ("true", "false") else _no(text)
    if isinstance(component, gr.Slider | gr.Number):
        return _number(text, component)
    if isinstance(component, gr.Dropdown):
        return _choice(text, component)
    most = getattr(component, "max_length", None) or TEXT
    return text if len(text) <= most else _no(text)


def _number(text: str, component: gr.Slider | gr.Number) -> float | int | None:
    if not text:
        return None if isinstance(component, gr.Number) else _no(text)
    value = float(text)
    low, high = component.minimum, component.maximum
    if not math.isfinite(value) or (low is not None and value < low):
        _no(text)
    if high is not None and value > high:
        _no(text)
    return int(value) if value == int(value) else value


def _choice(text: str, component: gr.Dropdown) -> object:
    known = {value for _, value in component.choices}
    if not component.multiselect:
        return text if text in known else _no(text)
    values = json.loads(text)
    usable = isinstance(values, list) and all(isinstance(v, str) and v in known for v in values)
    if not usable or len(values) > (component.max_choices or len(known)):
        _no(text)
    return values


def _no(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]!r} cannot be used.")
