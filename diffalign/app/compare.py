"""The tab "Compare": one prompt, the plain pipeline beside the same pipeline with techniques.

It holds no algorithm: techniques are the registry's, numbers are the session's report, the sheet is
``compare``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import gradio as gr
import torch
from PIL import Image

from diffalign import Cancelled, Report, load, supports, techniques
from diffalign.app.controls import Control, Values, controls_of, is_ready, technique_of
from diffalign.core.registry import parse
from diffalign.core.technique import Technique
from diffalign.core.types import Keywords
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.embedded.load import MODELS
from diffalign.families import family_of
from diffalign.generate.models import Setting, open_model
from diffalign.generate.samples import Sample, picture, samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import verdicts
from diffalign.seams.plan import context_of, resolve
from diffalign.tasks.geneval.verdict import parse_prompt

EXAMPLES = [
    "a photo of a red apple and a green clock",
    "a photo of three dogs",
    "a photo of a bear above a pizza",
    "a photo of a purple train",
]
Progress = Callable[..., object]
"""Called with (step, steps) and ``desc=``, the name of the column."""


def refusal(message: str) -> gr.Error:
    """An error for the page that leaves no traceback in the terminal."""
    return gr.Error(message, print_exception=False)


class Comparison:
    """One embedded model with its judge.

    ``draw`` is the only action: two runs on the same noise, one after the other.
    """

    def __init__(self, name: str = "emoji") -> None:
        self.model = open_model(name, Setting(device="cpu", dtype="fp32"))
        self.pipe, self.judge = self.model.pipe, load(MODELS[name].judge)
        works = {support.name for support in supports(self.pipe) if support.works}
        # not those that need a file
        self.classes = {
            name: cls for name, cls in techniques().items() if name in works and is_ready(cls)
        }
        self._busy = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """End the drawing that runs at its next step; without one, nothing happens."""
        self._stopped = True

    def resolved(self, name: str) -> Technique:
        """The technique with the options that it has on this model by default."""
        context = context_of(self.pipe, family_of(type(self.pipe)))
        technique: Technique = resolve(self.classes[name](), context, {})
        return technique

    def draw(
        self,
        prompt: str,
        columns: Mapping[str, Sequence[Technique]],
        scale: float,
        steps: float,
        seed: float,
        negative: str = "",
        progress: Progress | None = None,
    ) -> tuple[Image.Image, str, Image.Image | None]:
        """Sheet, report and plot of the last column. ``columns``: label -> techniques.

        Raises ``gr.Error`` with one line for bad input, and after ``stop``.
        """
        check(prompt, steps, seed)
        call: Keywords = {"guidance_scale": scale, "num_inference_steps": int(steps)}
        call |= {"negative_prompt": negative} if negative else {}
        try:
            with self._busy:
                self._stopped = False
                drawn = {
                    label: self._run(label, tools, prompt, call, int(seed), progress)
                    for label, tools in columns.items()
                }
        except Cancelled as error:
            raise refusal(
                "Stopped. The pipeline is as it was; draw again whenever you like."
            ) from error
        except ValueError as error:
            raise refusal(str(error)) from error
        sheet = contact_sheet(
            [[self._cell(sample) for sample in drawn.values()]],
            rows=[prompt],
            columns=list(drawn),
            title="",
            footer=f"{self.model.name}, {int(steps)} steps, seed {int(seed)}",
        )
        report: Report = list(drawn.values())[-1].report
        plot = report.plot() if any(value is not None for value in report.scale) else None
        return sheet, str(report), plot

    def _run(
        self,
        label: str,
        tools: Sequence[Technique],
        prompt: str,
        call: Keywords,
        seed: int,
        progress: Progress | None,
    ) -> Sample:
        count, steps = 0, call["num_inference_steps"]

        def step() -> None:
            nonlocal count
            count += 1
            if progress is not None:
                progress((count, steps), desc=label)
            if self._stopped:
                raise Cancelled

        if self._stopped:
            raise Cancelled
        jobs = jobs_of([prompt], base=seed)
        ((sample,),) = samples(self.pipe, tools, jobs, batch=1, call=call, step=step)
        return sample

    def _cell(self, sample: Sample) -> Cell:
        record = parse_prompt(sample.job.prompt)
        (verdict,) = verdicts(self.judge, torch.stack([sample.image]), [record])
        caption = f"{sample.report.nfe:g} evaluations, {sample.report.seconds:.1f} s"
        if verdict is None:
            return Cell(picture(sample.image), caption)
        caption += f"\n{verdict.reason}" if verdict.reason else ""
        return Cell(picture(sample.image), caption, verdict.correct)


def check(prompt: str, steps: float, seed: float) -> None:
    """Raise ``gr.Error`` for what a field of the page can hold and no run can use."""
    if not (prompt or "").strip():
        raise refusal("The prompt is empty. Say what to draw, e.g. 'a photo of three dogs'.")
    if not isinstance(seed, int | float) or not 0 <= seed < 2**63 or seed != int(seed):
        raise refusal(f"The seed must be a whole number from 0 to 2^63 - 1; got {seed}.")
    if not isinstance(steps, int | float) or steps != int(steps):
        raise refusal(f"Steps must be a whole number; got {steps}.")


def columns_of(
    names: Sequence[str] | None,
    text: str | None,
    scale: float,
    controls: list[Control],
    values: Values,
) -> dict[str, tuple[Technique, ...]]:
    """The plain column, and that with the chosen techniques or those of ``text``, which wins.

    Raises ``gr.Error`` with one line for bad input.
    """
    text = (text or "").strip()
    if not names and not text:
        raise refusal(
            "No technique is chosen. Pick one from the list, or write it in the command line's "
            "form."
        )
    try:
        tools = (
            parse(text)
            if text
            else tuple(technique_of(name, controls, values) for name in names or ())
        )
    except ValueError as error:
        raise refusal(str(error)) from error
    return {f"CFG {scale:g}": (), text or " + ".join(names or ()): tools}


def tab(comparison: Comparison) -> None:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt")
            negative = gr.Textbox(
                label="Negative prompt",
                placeholder="for guidance above 1, or for nag at any scale",
            )
            names = gr.Dropdown(
                list(comparison.classes),
                value=["adaptive-guidance"],
                multiselect=True,
                label="Techniques",
            )
            controls = option_groups(comparison, names)
            text = gr.Textbox(
                label="Or in the command line's form",
                placeholder="interval-cfg:start=0.1,stop=0.8+pladis",
            )
            with gr.Row():
                scale = gr.Slider(1.0, 10.0, value=1.5, step=0.1, label="Guidance scale")
                steps = gr.Slider(2, 50, value=20, step=1, label="Steps")
                seed = gr.Number(0, precision=0, label="Seed")
            with gr.Row():
                button = gr.Button("Draw", variant="primary")
                stop = gr.Button("Stop")
            gr.Examples(EXAMPLES, prompt)
        with gr.Column(scale=3):
            sheet = gr.Image(label="Same noise", type="pil", format="png")
            report = gr.Textbox(label="What it did and what it cost", lines=10)
            plot = gr.Image(
                label="Effective scale and agreement of the branches", type="pil", format="png"
            )

    def draw(
        values: Values,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Image.Image, str, Image.Image | None]:
        columns = columns_of(values[names], values[text], values[scale], controls, values)
        return comparison.draw(
            values[prompt],
            columns,
            values[scale],
            values[steps],
            values[seed],
            values[negative],
            progress,
        )

    inputs = {prompt, names, text, scale, steps, seed, negative}
    inputs |= {control.component for control in controls}
    outputs = [sheet, report, plot]
    gr.on([button.click, prompt.submit], draw, inputs, outputs, concurrency_limit=1)
    stop.click(comparison.stop, api_name="stop")


def option_groups(comparison: Comparison, names: gr.Dropdown) -> list[Control]:
    """One group of controls for each technique, shown while it is chosen in ``names``."""
    groups: dict[str, gr.Accordion] = {}
    controls: list[Control] = []
    for name, cls in comparison.classes.items():
        with gr.Accordion(f"Options of {name}", open=False, visible=name in names.value) as group:
            drawn = controls_of(name, cls, comparison.resolved(name))
        if drawn:
            groups[name] = group
            controls += drawn

    def show(chosen: list[str]) -> list[gr.Accordion]:
        return [gr.Accordion(visible=name in chosen) for name in groups]

    names.change(
        show, names, list(groups.values()), show_progress="hidden", api_visibility="private"
    )
    return controls
