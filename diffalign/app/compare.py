"""The tab "Compare": one prompt, the plain pipeline beside up to four techniques, the same noise.

It holds no algorithm: techniques are the registry's, images the sampling loop's, numbers the
session's report.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import gradio as gr
from gradio.components import FormComponent

from diffalign.app import snippets
from diffalign.app.bounds import PROMPT, TEXT, prompt_of, refusal, short
from diffalign.app.columns import Column, Variant, drawn
from diffalign.app.controls import Panel, Values, is_ready, panel
from diffalign.app.desk import Desk, Run
from diffalign.app.links import Fields
from diffalign.app.sampling import Sampling, Settings, buttons, sampling
from diffalign.app.sheet import Sheet, drawing, frame
from diffalign.app.shelf import Shelf
from diffalign.core.registry import TECHNIQUES, parse, techniques
from diffalign.core.technique import Technique

MOST = 4
"""Columns beside the plain one."""
PROMPTS = (
    "a photo of a red apple and a green clock",
    "a photo of three dogs",
    "a photo of a bear above a pizza",
    "a photo of a purple train",
)
EXAMPLES = [
    [PROMPTS[0], ["adaptive-guidance", "apg"]],
    [PROMPTS[1], ["interval-cfg", "pladis"]],
    [PROMPTS[2], ["cfg-zero-star", "s2-guidance"]],
    [PROMPTS[3], ["nag", "linear-ag"]],
]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be drawn; every field is checked."""

    prompt: str
    negative: str
    settings: Settings
    # label -> techniques
    columns: tuple[tuple[str, tuple[Technique, ...]], ...]

    @property
    def key(self) -> Hashable:
        """Equal for orders that give the same images."""
        return self.prompt, self.negative, self.settings, tuple(label for label, _ in self.columns)


def classes() -> dict[str, type[Technique]]:
    """The techniques that can be chosen: those that need no file and no object."""
    return {name: cls for name, cls in techniques().items() if is_ready(cls)}


def columns_of(
    names: list[str], text: str, controls: Panel, values: Values
) -> tuple[tuple[str, tuple[Technique, ...]], ...]:
    """The chosen techniques, a column each, then the lines of ``text``, a column each.

    Raises: ``gr.Error`` with one line for what cannot be used.
    """
    lines = [line.strip() for line in short(text, "Further columns", 5 * TEXT).splitlines()]
    lines = [line for line in lines if line]
    if not 1 <= len(names) + len(lines) <= MOST:
        raise refusal(
            f"Choose one to {MOST} techniques, from the list or as lines below it; got "
            f"{len(names) + len(lines)}."
        )
    try:
        groups: list[tuple[Technique, ...]] = [
            (controls.build(TECHNIQUES, name, values),) for name in names
        ]
        groups += [parse(line) for line in lines]
        return tuple((snippets.texts_of(group), group) for group in groups)
    except (ValueError, TypeError) as error:
        raise refusal(error) from error


def draw(order: Order, shelf: Shelf, run: Run[Sheet]) -> None:
    """Draw the columns, and tell each as it comes.

    Raises: ValueError for what this model cannot do.
    """
    settings = order.settings
    opened = shelf.images(settings.model)
    model = opened.setting(settings.steps, settings.scale, order.negative)
    plain = f"CFG {model.scale:g}" if model.scale != 1.0 else "plain"
    variants = [Variant(plain, (), model)]
    for label, group in order.columns:
        opened.check(group, model.call)
        variants.append(Variant(label, group, model))
    python = snippets.runs(
        model, order.prompt, settings.seed, [(v.techniques, v.model) for v in variants]
    )
    shell = snippets.commands(
        snippets.command(
            "compare",
            prompt=order.prompt,
            negative_prompt=order.negative or None,
            technique=[label for label, _ in order.columns],
            **settings.options,
        )
    )
    columns: list[Column] = []
    for column in drawn(opened, variants, order.prompt, settings.seed, run):
        columns.append(column)
        run.tell(Sheet(tuple(columns), len(variants), python, shell))


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of the tab."""

    prompt: gr.Textbox
    negative: gr.Textbox
    names: gr.Dropdown
    text: gr.Textbox
    controls: Panel
    sampling: Sampling

    @property
    def fields(self) -> Fields:
        """Those that stand in the address: all."""
        names: dict[str, FormComponent] = {"prompt": self.prompt, "negative": self.negative}
        names |= {"techniques": self.names, "more": self.text}
        options = {control.key: control.component for control in self.controls.controls}
        return Fields("compare", {**names, **self.sampling.components, **options})

    def order(self, values: Values) -> Order:
        """What the fields ask for. Raises: ``gr.Error`` for what cannot be used."""
        prompt = prompt_of(values[self.prompt])
        negative = short(values[self.negative] or "", "The negative prompt", PROMPT).strip()
        columns = columns_of(
            values[self.names] or [], values[self.text] or "", self.controls, values
        )
        return Order(prompt, negative, self.sampling.read(values), columns)


def form(shelf: Shelf) -> Form:
    """Draw the fields here."""
    items = classes()
    prompt = gr.Textbox(PROMPTS[0], label="Prompt", max_length=PROMPT)
    names = gr.Dropdown(
        list(items),
        value=["adaptive-guidance"],
        multiselect=True,
        max_choices=MOST,
        label="Techniques, a column each",
    )
    controls = panel(items, names.value)
    with gr.Accordion("Negative prompt, further columns", open=False):
        negative = gr.Textbox(
            label="Negative prompt",
            placeholder="for guidance above 1, or for nag at any scale",
            max_length=PROMPT,
        )
        text = gr.Textbox(
            label="Further columns in the command line's form, one a line",
            placeholder="interval-cfg:start=0.1,stop=0.8+pladis",
            lines=2,
            max_length=5 * TEXT,
        )
    fields = Form(prompt, negative, names, text, controls, sampling(shelf))
    names.change(
        controls.shown,
        names,
        list(controls.groups.values()),
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    fields.sampling.follow(shelf, items, controls)
    return fields


def tab(shelf: Shelf, desk: Desk) -> Fields:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = form(shelf)
            button = buttons("Draw", desk, "stop")
            examples = gr.Examples(EXAMPLES, [fields.prompt, fields.names], label="Examples")
        with gr.Column(scale=3, min_width=320):
            shown = frame("The plain pipeline (left) and a column (right); drag the line")
    run = drawing(fields.order, lambda order, run: draw(order, shelf, run), desk, shown)
    event = {
        "inputs": set(fields.fields.components.values()),
        "outputs": shown.components,
        "concurrency_limit": None,
        "show_progress_on": [shown.gallery],
    }
    gr.on([button.click, fields.prompt.submit], run, api_name="compare", **event)
    examples.load_input_event.then(run, api_visibility="private", **event)
    return fields.fields
