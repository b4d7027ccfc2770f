"""The tab "Negative prompt": what a negative prompt does by guidance, and what NAG makes of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import gradio as gr

from diffalign import NAG
from diffalign.app import snippets
from diffalign.app.bounds import PROMPT, prompt_of, refusal
from diffalign.app.columns import Column, Variant, drawn
from diffalign.app.controls import Panel, Values, panel
from diffalign.app.desk import Desk, Run
from diffalign.app.links import Fields
from diffalign.app.sampling import Sampling, Settings, buttons, sampling
from diffalign.app.sheet import Sheet, drawing, frame
from diffalign.app.shelf import Open, Shelf
from diffalign.core.registry import make
from diffalign.core.technique import Technique

EXAMPLES = [
    ["a photo of an apple", "a photo of a red apple"],
    ["a photo of a car", "a photo of a red car"],
    ["a photo of a dog and a cat", "a photo of a cat"],
]
SCALE = 3.0
NAMES = {"nag": NAG}


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be drawn; every field is checked."""

    prompt: str
    negative: str
    settings: Settings
    nag: Technique

    @property
    def key(self) -> Hashable:
        """Equal for orders that give the same images."""
        return self.prompt, self.negative, self.settings, snippets.text_of(self.nag)


def variants_of(order: Order, opened: Open) -> list[Variant]:
    """Without the negative prompt, with it by guidance, by NAG alone, and by NAG beside guidance.

    Guidance at scale 1, and a pipeline that takes no negative prompt, have NAG's columns only.
    Raises: ValueError for what this model cannot do.
    """
    settings = order.settings
    plain = opened.setting(settings.steps, settings.scale)
    alone = opened.setting(settings.steps, 1.0)
    guided = plain.scale != 1.0
    scale = f"{plain.scale:g}"
    variants = [Variant(f"CFG {scale}, nothing to avoid" if guided else "plain", (), plain)]
    if guided and "negative_prompt" in opened.blueprint.parameters:
        against = opened.setting(settings.steps, settings.scale, order.negative)
        variants.append(Variant(f"CFG {scale}, negative prompt", (), against))
    variants.append(Variant("NAG without CFG", (order.nag,), alone))
    if guided:
        variants.append(Variant(f"NAG and CFG {scale}", (order.nag,), plain))
    for variant in variants:
        opened.check(variant.techniques, variant.model.call)
    return variants


def shell_of(order: Order, guided: bool) -> str:
    """The same images by two commands: NAG beside guidance, and the negative prompt by guidance."""
    nag, common = snippets.text_of(order.nag), order.settings.options
    alone = f"cfg:scale=1+{nag}" if guided else nag
    lines = [
        snippets.command(
            "compare", prompt=order.prompt, technique=[alone, nag] if guided else [nag], **common
        )
    ]
    if guided:
        lines.append(
            snippets.command(
                "generate", prompt=order.prompt, negative_prompt=order.negative, **common
            )
        )
    return snippets.commands(*lines)


def draw(order: Order, shelf: Shelf, run: Run[Sheet]) -> None:
    """Draw the columns, and tell each as it comes.

    Raises: ValueError for what this model cannot do.
    """
    opened = shelf.images(order.settings.model)
    variants = variants_of(order, opened)
    model, seed = variants[0].model, order.settings.seed
    python = snippets.runs(model, order.prompt, seed, [(v.techniques, v.model) for v in variants])
    shell = shell_of(order, model.scale != 1.0)
    base = 1 if len(variants) > 2 and not variants[1].techniques else 0
    columns: list[Column] = []
    for column in drawn(opened, variants, order.prompt, seed, run):
        columns.append(column)
        run.tell(Sheet(tuple(columns), len(variants), python, shell, base))


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of the tab."""

    prompt: gr.Textbox
    negative: gr.Textbox
    controls: Panel
    sampling: Sampling

    @property
    def fields(self) -> Fields:
        """Those that stand in the address: all."""
        options = {control.key: control.component for control in self.controls.controls}
        texts = {"prompt": self.prompt, "negative": self.negative}
        return Fields("negative", {**texts, **self.sampling.components, **options})

    def order(self, values: Values) -> Order:
        """What the fields ask for. Raises: ``gr.Error`` for what cannot be used."""
        prompt = prompt_of(values[self.prompt])
        negative = prompt_of(values[self.negative], "negative prompt")
        options = self.controls.options("nag", values) | {"negative_prompt": negative}
        try:
            nag = make("nag", options)
            snippets.text_of(nag)
        except (ValueError, TypeError) as error:
            raise refusal(error) from error
        return Order(prompt, negative, self.sampling.read(values), nag)


def form(shelf: Shelf) -> Form:
    """Draw the fields here."""
    gr.Markdown(
        "A negative prompt by guidance costs nothing more, and needs a scale above 1. NAG needs no "
        "guidance. The embedded models are small and obey few negative prompts."
    )
    prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", max_length=PROMPT)
    negative = gr.Textbox(EXAMPLES[0][1], label="What to avoid", max_length=PROMPT)
    controls = panel(NAMES, ["nag"], without=("negative_prompt",))
    fields = Form(prompt, negative, controls, sampling(shelf, scale=SCALE))
    fields.sampling.follow(shelf, NAMES, controls)
    return fields


def tab(shelf: Shelf, desk: Desk) -> Fields:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = form(shelf)
            button = buttons("Draw", desk)
            examples = gr.Examples(EXAMPLES, [fields.prompt, fields.negative], label="Examples")
        with gr.Column(scale=3, min_width=320):
            shown = frame("By guidance (left) and by NAG (right); drag the line")
    run = drawing(fields.order, lambda order, run: draw(order, shelf, run), desk, shown)
    event = {
        "inputs": set(fields.fields.components.values()),
        "outputs": shown.components,
        "concurrency_limit": None,
        "show_progress_on": [shown.gallery],
    }
    texts = [fields.prompt.submit, fields.negative.submit]
    gr.on([button.click, *texts], run, api_name="negative_prompt", **event)
    examples.load_input_event.then(run, api_visibility="private", **event)
    return fields.fields
