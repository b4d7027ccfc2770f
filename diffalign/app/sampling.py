"""The fields of every tab with images: model, guidance scale, steps, seed; and its buttons."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import gradio as gr
from gradio.components import FormComponent

from diffalign.app.bounds import SCALE, SEED, STEPS, number, refusal, whole
from diffalign.app.controls import Panel, Values
from diffalign.app.desk import Desk, visitor_of
from diffalign.app.shelf import USUAL, Open, Shelf
from diffalign.core.technique import Technique
from diffalign.embedded.load import MODELS


@dataclass(frozen=True, slots=True)
class Settings:
    """How images are to be sampled."""

    model: str
    scale: float
    steps: int
    seed: int

    @property
    def options(self) -> dict[str, object]:
        """As the command line takes them."""
        numbers = {"scale": f"{self.scale:.15g}", "steps": self.steps, "seed": self.seed}
        return {"model": self.model, **numbers}


@dataclass(frozen=True, slots=True)
class Sampling:
    """The fields."""

    model: gr.Dropdown
    scale: gr.Slider
    steps: gr.Slider
    seed: gr.Number

    @property
    def components(self) -> dict[str, FormComponent]:
        """Name in the address -> field."""
        return {name: getattr(self, name) for name in ("model", "scale", "steps", "seed")}

    def read(self, values: Values) -> Settings:
        """What the fields hold. Raises: ``gr.Error`` for what cannot be used."""
        return Settings(
            str(values[self.model]),
            number(values[self.scale], "The guidance scale", 1.0, SCALE),
            whole(values[self.steps], "Steps", 1, STEPS),
            whole(values[self.seed], "The seed", 0, SEED),
        )

    def follow(
        self, shelf: Shelf, classes: Mapping[str, type[Technique]], panel: Panel | None
    ) -> None:
        """When another model is chosen, show its own scale and steps, and what its options are."""
        targets = [] if panel is None else [c.component for c in panel.controls if c.automatic]

        def show(name: str) -> dict[FormComponent, object]:
            opened = opened_of(shelf, name)
            updates: dict[FormComponent, object] = {
                self.scale: opened.model.scale,
                self.steps: opened.model.steps,
            }
            if panel is not None:
                updates |= panel.defaults(opened.resolved(classes))
            return updates

        self.model.input(
            show,
            self.model,
            [self.scale, self.steps, *targets],
            show_progress="hidden",
            api_visibility="private",
        )


def opened_of(shelf: Shelf, name: str) -> Open:
    """The model, or ``gr.Error`` with the reason."""
    try:
        return shelf.open(name)
    except ValueError as error:
        raise refusal(error) from error


def sampling(
    shelf: Shelf, steps: int | None = None, scale: float | None = None, *, videos: bool = False
) -> Sampling:
    """Draw the fields here; steps and scale are those of the first model, or as given. ``videos``:
    models that are known to make videos are offered too."""
    usual = MODELS[USUAL].defaults
    with gr.Row():
        model = gr.Dropdown(shelf.offered(videos=videos), value=USUAL, label="Model", min_width=140)
        seed = gr.Number(0, precision=0, minimum=0, maximum=SEED, label="Seed", min_width=110)
        dice = gr.Button("New seed", size="sm", min_width=100, scale=0, elem_classes=["beside"])
    with gr.Row():
        guidance = gr.Slider(
            1.0,
            SCALE,
            value=scale or usual["scale"],
            step=0.1,
            label="Guidance",
            min_width=150,
        )
        count = gr.Slider(
            1, STEPS, value=steps or int(usual["steps"]), step=1, label="Steps", min_width=150
        )
    dice.click(
        lambda: random.SystemRandom().randrange(2**31),
        None,
        seed,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return Sampling(model, guidance, count, seed)


def buttons(text: str, desk: Desk, api_name: str | None = None) -> gr.Button:
    """A button that starts, and one that stops the visitor's run; the first is returned."""
    with gr.Row():
        start = gr.Button(text, variant="primary", min_width=140)
        stop = gr.Button("Stop", variant="stop", min_width=90)

    def end(request: gr.Request) -> None:
        desk.stop(visitor_of(request))

    visibility = "private" if api_name is None else "public"
    stop.click(
        end,
        queue=False,
        show_progress="hidden",
        api_name=api_name,
        api_visibility=visibility,  # type: ignore[arg-type]
    )
    return start
