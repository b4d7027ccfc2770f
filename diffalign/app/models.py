"""The tab "Models": what each model is, which techniques work on it, which not and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr

from diffalign.app import snippets
from diffalign.app.bounds import short
from diffalign.app.desk import Desk, Run, visitor_of
from diffalign.app.links import Fields
from diffalign.app.sheet import Outputs, code
from diffalign.app.shelf import USUAL, Open, Shelf
from diffalign.embedded.load import MODELS
from diffalign.families import family_of

HEADS = ["technique", "works", "cost, or why not"]


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a model or of a pipeline class."""

    text: str
    # technique, works, cost or reason
    rows: tuple[tuple[str, str, str], ...]
    python: str
    shell: str


def describe(name: str, shelf: Shelf, run: Run[Card]) -> None:
    """Tell the card of a model of the list, or of a diffusers class by its name.

    Raises: ValueError for a name that is neither, and for a class that is refused.
    """
    run.tell(class_card(name) if is_class(name) else model_card(shelf.open(name)))


def is_class(name: str) -> bool:
    """Whether a name is meant as that of a pipeline class."""
    return name.isidentifier() and name.endswith("Pipeline")


def class_card(name: str) -> Card:
    """Whether techniques work on a pipeline class, before any model is loaded."""
    family = family_of(type(name, (), {}))
    gates = ", ".join(family.gates) or "none to set; it is distilled into the model"
    text = (
        f"{name} is supported: family {family.name}, guidance scale {gates}. Load a model to see "
        "every technique."
    )
    python = (
        f"from diffusers import {name}\n\nfrom diffalign.families import family_of\n\n"
        f"print(family_of({name}).name)\n"
    )
    return Card(text, (), python, snippets.command("models", name))


def model_card(opened: Open) -> Card:
    """Every technique on a loaded model."""
    model, pipe = opened.model, opened.model.pipe
    weights = sum(
        parameter.numel()
        for part in pipe.components.values()
        if hasattr(part, "parameters")
        for parameter in part.parameters()
    )
    what = MODELS[model.name].description if model.kind == "embedded" else f"from a {model.kind}"
    text = (
        f"{model.name}: {what}\n{type(pipe).__name__}, family {opened.blueprint.family.name}, "
        f"{model.scheduler}, {weights / 1e6:.3g} million weights, {str(pipe.dtype)[6:]} on "
        f"{pipe.device}; {model.steps} steps and guidance scale {model.scale:g} unless told "
        "otherwise"
    )
    rows = tuple(
        (s.name, "yes" if s.works else "no", s.cost if s.works else s.reason)
        for s in sorted(opened.supports, key=lambda s: (not s.works, s.name))
    )
    lines = ["import diffalign as da", snippets.loading(model), "print(da.supports(pipe))"]
    return Card(
        text, rows, "\n\n".join(lines) + "\n", snippets.command("models", type(pipe).__name__)
    )


def tab(shelf: Shelf, desk: Desk) -> Fields:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(
                "Models of this page's list: those that ship, and folders and hub ids that "
                "`diffalign app --allow` names. The name of a diffusers class, like "
                "`FluxPipeline`, says whether models of that class are supported."
            )
            name = gr.Dropdown(
                list(shelf.names),
                value=USUAL,
                allow_custom_value=True,
                label="Model, folder, hub id or pipeline class",
            )
            button = gr.Button("Show", variant="primary")
        with gr.Column(scale=3, min_width=320):
            text = gr.Textbox(label="What it is", lines=3, max_lines=6)
            table = gr.Dataframe(
                headers=HEADS,
                label="Techniques",
                interactive=False,
                wrap=True,
                type="array",
                max_height=900,
                column_widths=["22%", "10%", "68%"],
            )
            python, shell = code()

    def run(model: str, request: gr.Request) -> Iterator[Outputs]:
        label = short(model or "", "The model").strip()

        def work(run: Run[Card]) -> None:
            describe(label, shelf, run)

        for card in desk.run(visitor_of(request), work):
            yield {
                text: card.text,
                table: [list(row) for row in card.rows],
                python: card.python,
                shell: card.shell,
            }

    gr.on(
        [button.click, name.select],
        run,
        name,
        [text, table, python, shell],
        api_name="model",
        concurrency_limit=None,
        show_progress_on=[text],
    )
    return Fields("models", {"model": name})
