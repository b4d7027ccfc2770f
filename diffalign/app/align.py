"""The tab "Align": any search or noise optimiser on one prompt, watched while it runs."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component
from PIL import Image
from torch import Tensor

from diffalign.alignment import align
from diffalign.alignment.driver import Status
from diffalign.alignment.result import Result, picture
from diffalign.app import snippets
from diffalign.app.bounds import PROMPT, TEXT, prompt_of, refusal, short, whole
from diffalign.app.columns import enlarged
from diffalign.app.controls import Panel, Values, is_ready, panel
from diffalign.app.desk import Desk, Progress, Run, bar, visitor_of
from diffalign.app.links import Fields
from diffalign.app.sampling import Sampling, Settings, buttons, sampling
from diffalign.app.sheet import Outputs, before_after, chart, code, pictures
from diffalign.app.shelf import Shelf
from diffalign.core.budget import Budget
from diffalign.core.errors import BudgetExceeded
from diffalign.core.registry import KERNELS, METHODS, parse
from diffalign.core.search import Candidate, Method
from diffalign.core.technique import Technique
from diffalign.drawing.charts import Curve, line_chart
from diffalign.drawing.tree import tree_picture
from diffalign.drawing.video import evenly, gif
from diffalign.embedded.load import reward_of

NFE = 5000
"""The largest budget, in denoiser rows."""
OWN = "the scheduler's own"
PAUSE_S = 2.0
"""Seconds between two drawings of the curve while a search runs."""
PROMPTS = (
    "a photo of a red apple and a green clock",
    "a photo of three dogs",
    "a photo of a bear above a pizza",
)
EXAMPLES = [
    [PROMPTS[0], "best-of-n", OWN, 320],
    [PROMPTS[1], "dts-star", "eta", 400],
    [PROMPTS[2], "zero-order", OWN, 400],
]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be searched; every field is checked."""

    prompt: str
    settings: Settings
    method: Method[object]
    reward: str
    # of the random steps; None for the scheduler's own
    kernel: str | None
    nfe: int
    techniques: tuple[Technique, ...]


@dataclass(slots=True)
class Story:
    """What a search has found so far; at its end its result."""

    # (NFE, best score), one point for each step of the method
    points: list[tuple[float, float]]
    # the newest best image last
    best: list[tuple[Image.Image, float]]
    text: str = ""
    python: str = ""
    shell: str = ""
    result: Result | None = None

    def copy(self) -> Story:
        """As it is now."""
        return Story(
            list(self.points), list(self.best), self.text, self.python, self.shell, self.result
        )


def search(order: Order, shelf: Shelf, run: Run[Story]) -> None:
    """Search, and tell each better image; what the visitor stops ends with the best one.

    Raises: ValueError for what cannot work on this model.
    """
    settings = order.settings
    opened = shelf.open(settings.model)
    model = opened.setting(settings.steps, settings.scale)
    opened.check(order.techniques, model.call)
    story = Story([], [])
    story.python = snippets.search(
        model,
        order.prompt,
        settings.seed,
        order.method,
        order.reward,
        order.kernel,
        order.nfe,
        order.techniques,
    )
    story.shell = snippets.commands(shell_of(order))
    run.tell(story.copy())

    def show(status: Status) -> None:
        best = "none yet" if status.best is None else f"{status.best:.4f}"
        story.text = f"best {best} after {status.nfe} NFE, {status.seconds:.0f} s"
        if status.best is not None:
            story.points.append((status.nfe, status.best))
        run.tell(Progress(min(status.nfe, order.nfe), order.nfe, story.text))
        run.tell(story.copy())

    def improved(candidate: Candidate) -> None:
        image = candidate.image if candidate.image.ndim == 3 else candidate.image[0]
        story.best.append((picture(image), candidate.score))
        run.tell(story.copy())

    try:
        story.result = align(
            model.pipe,
            order.prompt,
            method=order.method,
            reward=order.reward,
            budget=Budget(nfe=order.nfe),
            techniques=order.techniques,
            kernel=order.kernel,
            seed=settings.seed,
            show=show,
            improved=improved,
            stop=run.stopped.is_set,
            **model.call,
        )
    except BudgetExceeded as error:
        raise ValueError(f"The budget ended before the first image: {error}") from error
    run.tell(story.copy())


def shell_of(order: Order) -> str:
    """The same search by the command line."""
    return snippets.command(
        "align",
        order.prompt,
        method=snippets.method_text(order.method),
        reward=order.reward,
        kernel=order.kernel,
        budget=f"nfe={order.nfe}",
        technique=[snippets.texts_of(order.techniques)] if order.techniques else None,
        **order.settings.options,
    )


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of the tab."""

    prompt: gr.Textbox
    method: gr.Dropdown
    reward: gr.Dropdown
    kernel: gr.Dropdown
    nfe: gr.Slider
    techniques: gr.Textbox
    controls: Panel
    sampling: Sampling

    @property
    def fields(self) -> Fields:
        """Those that stand in the address: all."""
        names = ("prompt", "method", "reward", "kernel", "nfe", "techniques")
        options = {control.key: control.component for control in self.controls.controls}
        components = {name: getattr(self, name) for name in names}
        return Fields("align", {**components, **self.sampling.components, **options})

    def order(self, values: Values) -> Order:
        """What the fields ask for. Raises: ``gr.Error`` for what cannot be used."""
        prompt = prompt_of(values[self.prompt])
        nfe = whole(values[self.nfe], "The budget", 1, NFE)
        text = short(values[self.techniques] or "", "Techniques").strip()
        try:
            method = self.controls.build(METHODS, str(values[self.method]), values)
            techniques = parse(text) if text else ()
            snippets.method_text(method), snippets.texts_of(techniques)
        except (ValueError, TypeError) as error:
            raise refusal(error) from error
        settings = self.sampling.read(values)
        kernel = None if values[self.kernel] == OWN else str(values[self.kernel])
        return Order(prompt, settings, method, str(values[self.reward]), kernel, nfe, techniques)


def form(shelf: Shelf) -> Form:
    """Draw the fields here."""
    items = {name: cls for name, cls in METHODS.all().items() if is_ready(cls)}
    prompt = gr.Textbox(PROMPTS[0], label="Prompt", max_length=PROMPT)
    with gr.Row():
        method = gr.Dropdown(list(items), value="best-of-n", label="Method", min_width=140)
        reward = gr.Dropdown(
            list(shelf.rewards), value=shelf.rewards[0], label="Reward to raise", min_width=140
        )
    controls = panel(items, ["best-of-n"])
    kernel = gr.Dropdown(
        [OWN, *KERNELS.names()],
        value=OWN,
        label="Noise while sampling",
        info="a method that branches needs some; eta fits most models, flow-sde flow matching",
    )
    nfe = gr.Slider(40, NFE, value=320, step=20, label="Budget", info="denoiser rows (NFE)")
    with gr.Accordion("Techniques in every call", open=False):
        techniques = gr.Textbox(
            label="In the command line's form", placeholder="cfg-zero-star", max_length=TEXT
        )
    method.change(
        lambda name: controls.shown([name]),
        method,
        list(controls.groups.values()),
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    method.input(
        lambda name: "eta" if METHODS.get(name).branches else OWN,  # type: ignore[attr-defined]
        method,
        kernel,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    fields = Form(
        prompt, method, reward, kernel, nfe, techniques, controls, sampling(shelf, videos=True)
    )
    fields.sampling.follow(shelf, {}, None)
    fields.sampling.model.input(
        lambda name: gr.update(value=reward_of(name)) if reward_of(name) else gr.skip(),
        fields.sampling.model,
        reward,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return fields


@dataclass(frozen=True, slots=True)
class Frame:
    """The components that show a story."""

    slider: gr.ImageSlider
    video: gr.HTML
    text: gr.Textbox
    curve: gr.Image
    gallery: gr.Gallery
    tree: gr.Image
    python: gr.Code
    shell: gr.Code

    @property
    def components(self) -> list[Component]:
        """All of them."""
        return [getattr(self, name) for name in self.__slots__]

    def show(self, story: Story) -> Outputs:
        """Updates that show a story, ended or not."""
        outputs: Outputs = {self.python: story.python, self.shell: story.shell}
        outputs[self.text] = story.text
        if story.result is not None:
            return outputs | self._ended(story.result, story)
        if story.best:
            outputs[self.slider] = enlarged(story.best[0][0]), enlarged(story.best[-1][0])
            outputs[self.gallery] = [(image, f"{score:.3f}") for image, score in story.best[::-1]]
        return outputs

    def _ended(self, result: Result, story: Story) -> Outputs:
        first = result.first.image if result.first.image.ndim == 3 else result.first.image[0]
        stopped = "Stopped; this is the best so far. " if result.end == "interrupted" else ""
        has_tree = result.tree is not None and bool(result.tree.images)
        drawing = tree_picture(result.tree, result.prompt) if has_tree and result.tree else None
        return {
            self.slider: (enlarged(picture(first)), enlarged(result.image)),
            self.text: f"{stopped}{result}",
            self.gallery: [
                (picture(c.image if c.image.ndim == 3 else c.image[0]), f"{c.score:.3f}")
                for c in result.top
            ],
            self.curve: gr.Image(curve_of(story.points), visible=bool(story.points)),
            self.tree: gr.Image(drawing, visible=drawing is not None),
            self.video: gr.HTML(moving(result), visible=result.tensor.ndim == 4),
        }


def moving(result: Result) -> str:
    """The first video of a search and its result, both moving; "" for images."""
    if result.tensor.ndim != 4:
        return ""
    videos = (("The first whole one", result.first.image), ("The best", result.tensor))
    return "".join(
        f'<figure style="display: inline-block; margin: 0 1em 0 0"><img class="pixels" '
        f'alt="{name}" src="data:image/gif;base64,{_gif(video)}"><figcaption>{name}</figcaption>'
        "</figure>"
        for name, video in videos
    )


def _gif(video: Tensor) -> str:
    """At most 48 frames of a video, none larger than 384 pixels."""
    frames = [picture(video[i]) for i in evenly(len(video), 48)]
    for frame in frames:
        frame.thumbnail((384, 384))
    return base64.b64encode(gif([enlarged(frame, 256) for frame in frames])).decode()


def curve_of(points: Sequence[tuple[float, float]]) -> Image.Image | None:
    """The best score against NFE, None before there is one."""
    if not points:
        return None
    return line_chart(
        [Curve("best so far", points)],
        x_label="NFE (denoiser rows)",
        y_label="reward",
        title="Reward against NFE",
        size=(900, 360),
    )


def frame() -> Frame:
    """Draw the components here."""
    slider = before_after("The first image (left) and the best so far (right); drag the line")
    video = gr.HTML(visible=False)
    text = gr.Textbox(label="Where it stands", lines=2, max_lines=6)
    curve = chart("Reward against NFE")
    gallery = pictures("Candidates, best first")
    tree = chart("The tree that was searched")
    return Frame(slider, video, text, curve, gallery, tree, *code())


def tab(shelf: Shelf, desk: Desk) -> Fields:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = form(shelf)
            button = buttons("Search", desk)
            examples = [fields.prompt, fields.method, fields.kernel, fields.nfe]
            gr.Examples(EXAMPLES, examples, label="Examples")
        with gr.Column(scale=3, min_width=320):
            shown = frame()

    def run(
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Outputs]:
        order = fields.order(values)
        drawn_s = 0.0

        def work(run: Run[Story]) -> None:
            search(order, shelf, run)

        for story in desk.run(visitor_of(request), work, bar(progress)):
            outputs = shown.show(story)
            if story.points and time.monotonic() - drawn_s > PAUSE_S:
                outputs[shown.curve] = gr.Image(curve_of(story.points), visible=True)
                drawn_s = time.monotonic()
            yield outputs

    gr.on(
        [button.click, fields.prompt.submit],
        run,
        set(fields.fields.components.values()),
        shown.components,
        api_name="align",
        concurrency_limit=None,
        show_progress_on=[shown.text],
    )
    return fields.fields
