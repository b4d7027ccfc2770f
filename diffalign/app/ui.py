"""The demo in a browser: one prompt, the plain pipeline beside the same pipeline with techniques.
Controls come from the registry.

It holds no algorithm: techniques are the registry's, numbers are the session's report, the sheet is
``compare``'s.
"""

from __future__ import annotations

import threading
from dataclasses import MISSING, fields
from typing import Any

import gradio as gr
import torch
from PIL import Image

from diffalign import Cancelled, Session, apply, load, supports, techniques
from diffalign.core.registry import make, parse
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.tasks.geneval.verdict import Detection, parse_prompt, verdict

EXAMPLES = [
    "a photo of a red apple and a green clock",
    "a photo of three dogs",
    "a photo of a bear above a pizza",
    "a photo of a purple train",
]


def _refused(message: str) -> gr.Error:
    """An error for the page that leaves no traceback in the terminal."""
    return gr.Error(message, print_exception=False)


class Demo:
    """One embedded model with its judge.

    ``draw`` is the only action: two runs on the same noise, one after the other.
    """

    def __init__(self, name: str = "emoji") -> None:
        self.pipe, self.judge = load(name), load(f"{name}-judge")
        self.name = name
        ready = {
            n
            for n, c in techniques().items()
            if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(c))
        }
        self.choices = [
            row.name for row in supports(self.pipe) if row.works and row.name in ready
        ]  # not those that need a file
        self._busy = threading.Lock()
        self._session: Session | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the drawing that runs at its next step; without one, nothing happens."""
        self._stopped = True
        if self._session is not None:
            self._session.cancel()

    def techniques(self, names: list[str], text: str) -> tuple[Any, ...]:
        """The chosen names with default options, or ``text`` in the command line's form, which
        wins."""
        return parse(text.strip()) if text.strip() else tuple(make(name, {}) for name in names)

    def draw(
        self,
        prompt: str,
        names: list[str],
        text: str,
        scale: float,
        steps: float,
        seed: float,
        negative: str = "",
        progress: Any = None,
    ) -> tuple[Image.Image, str, Image.Image | None]:
        """Sheet, report and plot.

        Raises ``gr.Error`` with one line for bad input, and after ``stop``.
        """
        prompt, names, text = prompt or "", names or [], text or ""
        if not prompt.strip():
            raise _refused("The prompt is empty. Say what to draw, e.g. 'a photo of three dogs'.")
        if not names and not text.strip():
            raise _refused(
                "No technique is chosen. Pick one from the list, or write it in the command "
                "line's form."
            )
        if not isinstance(seed, int | float) or not 0 <= seed < 2**63 or seed != int(seed):
            raise _refused(f"The seed must be a whole number from 0 to 2^63 - 1; got {seed}.")
        if not isinstance(steps, int | float) or steps != int(steps):
            raise _refused(f"Steps must be a whole number; got {steps}.")
        try:
            columns = {
                f"CFG {scale:g}": (),
                text.strip() or " + ".join(names): self.techniques(names, text),
            }
            with self._busy:
                self._stopped = False
                given = {
                    "prompt": prompt,
                    "negative_prompt": negative or None,
                    "guidance_scale": scale,
                    "num_inference_steps": int(steps),
                }
                drawn = {
                    name: self._run(given, tools, int(seed), progress)
                    for name, tools in columns.items()
                }
        except Cancelled as error:
            raise _refused(
                "Stopped. The pipeline is as it was; draw again whenever you like."
            ) from error
        except ValueError as error:
            raise _refused(str(error)) from error
        cells = [[cell for cell, _ in drawn.values()]]
        sheet = contact_sheet(
            cells,
            rows=[prompt],
            columns=list(drawn),
            title="",
            footer=f"{self.name}, {int(steps)} steps, seed {int(seed)}",
        )
        report = list(drawn.values())[-1][1]
        plot = report.plot() if any(value is not None for value in report.scale) else None
        return sheet, str(report), plot

    def _run(
        self, given: dict[str, Any], tools: tuple[Any, ...], seed: int, progress: Any
    ) -> tuple[Cell, Any]:
        def tick(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if progress is not None:
                progress(
                    (index + 1, given["num_inference_steps"]),
                    desc="plain" if not tools else "with techniques",
                )
            return values

        with apply(self.pipe, *tools) as session:
            self._session = session
            if self._stopped:
                raise Cancelled
            generator = torch.Generator().manual_seed(seed)
            image = self.pipe(
                **given, generator=generator, callback_on_step_end=tick, output_type="pt"
            ).images
        report = session.report()
        found: list[Detection] = self.judge.detect(image)[0]
        metadata = parse_prompt(given["prompt"])
        said = verdict(metadata, found, self.judge.thresholds) if metadata else None
        picture = Image.fromarray(
            (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        )
        caption = f"{report.nfe:g} evaluations, {report.seconds:.1f} s" + (
            f"\n{said.reason}" if said and said.reason else ""
        )
        return Cell(picture, caption, said.correct if said else None), report


def build(demo: Demo) -> gr.Blocks:
    """The page. ``launch`` it, or mount it."""

    def act(
        prompt: str,
        names: list[str],
        text: str,
        scale: float,
        steps: float,
        seed: float,
        negative: str = "",
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        return demo.draw(prompt, names, text, scale, steps, seed, negative, progress)

    page: gr.Blocks = gr.Blocks(title="diffalign", analytics_enabled=False)
    with page:
        gr.Markdown(
            "# diffalign\nThe same noise, drawn by the plain pipeline and with techniques around "
            "it. Switching off leaves nothing behind."
        )
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(EXAMPLES[0], label="Prompt")
                negative = gr.Textbox(
                    label="Negative prompt",
                    placeholder="for guidance above 1, or for nag at any scale",
                )
                names = gr.Dropdown(
                    demo.choices,
                    value=["adaptive-guidance"],
                    multiselect=True,
                    label="Techniques, with their default options",
                )
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
        inputs = [prompt, names, text, scale, steps, seed, negative]
        gr.on(
            [button.click, prompt.submit], act, inputs, [sheet, report, plot], concurrency_limit=1
        )
        stop.click(demo.stop, api_name="stop")
    return page
