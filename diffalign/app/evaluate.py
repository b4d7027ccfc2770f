"""The tab "Evaluate": a few prompts of GenEval with and without a technique, and the report."""

from __future__ import annotations

import html
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from gradio.components import Component

from diffalign.app import snippets
from diffalign.app.bounds import TEXT, refusal, short, whole
from diffalign.app.controls import Values
from diffalign.app.desk import Desk, Progress, Run, bar, visitor_of
from diffalign.app.links import Fields
from diffalign.app.sampling import Sampling, Settings, buttons, sampling
from diffalign.app.sheet import Outputs, code
from diffalign.app.shelf import Shelf
from diffalign.core.registry import parse
from diffalign.core.technique import Technique
from diffalign.core.types import Json, Keywords
from diffalign.embedded.load import MODELS
from diffalign.eval.benchmarks import Benchmark, named
from diffalign.eval.files import RunError
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import Plan, generate
from diffalign.eval.report import difference_text, number_text, report, spread_text
from diffalign.eval.results import columns
from diffalign.eval.scorers import Scorer, load_scorer
from diffalign.eval.scoring import pictures_of, score
from diffalign.generate.models import Model
from diffalign.tasks.geneval.prompts import TAGS

PROMPTS, IMAGES = 40, 4
ALL = "all categories"
HEADS = ["run", "score, 95% interval", "NFE", "seconds of an image", "images"]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be evaluated; every field is checked."""

    text: str
    techniques: tuple[Technique, ...]
    category: str
    prompts: int
    images: int
    settings: Settings

    @property
    def tags(self) -> tuple[str, ...]:
        """The categories; none for all."""
        return () if self.category == ALL else (self.category,)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of an evaluation."""

    # of the table
    rows: tuple[tuple[str, ...], ...]
    # the paired difference in words
    text: str
    # the page of the report
    page: str
    python: str
    shell: str


def evaluate(order: Order, shelf: Shelf, run: Run[Finding]) -> None:
    """Make, score and compare both runs in a folder that is removed again, and tell the result.

    Raises: ValueError for what this model cannot do.
    """
    settings = order.settings
    opened = shelf.images(settings.model)
    if opened.model.kind != "embedded":
        raise ValueError(
            "The page evaluates embedded models, which have a judge on board. For "
            f"{opened.name}: diffalign eval geneval --model {opened.name}"
        )
    model = opened.setting(settings.steps, settings.scale)
    opened.check(order.techniques, model.call)
    scorer = load_scorer(MODELS[opened.name].judge, "cpu")
    benchmark = named("geneval", order.tags)
    shell = snippets.commands(*shell_of(order))
    with tempfile.TemporaryDirectory(prefix="diffalign-eval-") as place:
        try:
            finding = _evaluated(order, model, benchmark, scorer, Path(place), run, shell)
        except RunError as error:
            run.check()
            raise ValueError(str(error)) from error
    run.tell(finding)


def _evaluated(
    order: Order,
    model: Model,
    benchmark: Benchmark,
    scorer: Scorer,
    place: Path,
    run: Run[Finding],
    shell: str,
) -> Finding:
    total = 4 * order.prompts * order.images
    count = 0

    def progress(text: str) -> Callable[[int], None]:
        def told(images: int) -> None:
            nonlocal count
            count += images
            run.tell(Progress(count, total, text))
            run.check()

        return told

    for name, group in (("plain", ()), ("techniques", order.techniques)):
        plan = Plan(benchmark, stoppable(model, run), group, order.images, order.settings.seed)
        folder = RunFolder.begin(place / name, plan.settings())
        items = benchmark.spread(order.prompts)
        generate(plan, folder, items, progress=progress(f"drawing: {name}"))
        score(scorer, folder, pictures_of(folder), progress=progress(f"judging: {name}"))
    table = columns([place / "plain", place / "techniques"])
    numbers, files = report(table, place / "report")
    (page,) = (file for file in files if file.name == "index.html")
    timing = {column.label: seconds_of(column.timings) for column in table}
    return Finding(
        rows_of(numbers, timing),
        words_of(numbers),
        page.read_text("utf-8"),
        python_of(order, model),
        shell,
    )


def seconds_of(timings: tuple[Json, ...]) -> float:
    """Mean seconds of an image."""
    seconds, images = (sum(float(t[name]) for t in timings) for name in ("seconds", "images"))
    return seconds / max(images, 1.0)


def stoppable(model: Model, run: Run[Finding]) -> Model:
    """The model, whose runs end at their next step once the visitor stops them."""
    if "callback_on_step_end" not in inspect.signature(type(model.pipe).__call__).parameters:
        return model

    def check(pipe: object, index: int, time: object, values: Keywords) -> Keywords:
        run.check()
        return values

    return replace(model, call={**model.call, "callback_on_step_end": check})


def rows_of(numbers: Json, seconds: dict[str, float]) -> tuple[tuple[str, ...], ...]:
    """The lines of the table."""
    return tuple(
        (
            label,
            spread_text(result["mean_of_tags"]),
            number_text(result["nfe"]),
            f"{seconds[label]:.2f}",
            str(result["images"]),
        )
        for label, result in numbers["results"].items()
    )


def words_of(numbers: Json) -> str:
    """The paired difference in words."""
    lines = [
        f"{entry['b']} minus {entry['a']}: {difference_text(entry)} by prompt; won {entry['won']}, "
        f"tied {entry['tied']}, lost {entry['lost']}"
        for entry in numbers["comparisons"]
    ]
    few = "A few prompts say little: an interval that holds 0 is no difference."
    return "\n".join([*lines, few])


def shell_of(order: Order) -> list[str]:
    """The same by the command line: two runs and their report."""
    common: dict[str, object] = {
        "limit": order.prompts,
        "samples": order.images,
        "category": list(order.tags) or None,
        **order.settings.options,
    }
    return [
        snippets.command("eval", "geneval", **common, output="outputs/plain"),
        snippets.command(
            "eval", "geneval", technique=order.text, **common, output="outputs/techniques"
        ),
        snippets.command(
            "eval", "report", "outputs/plain", "outputs/techniques", output="outputs/report"
        ),
    ]


def python_of(order: Order, model: Model) -> str:
    """The same from Python."""
    settings = order.settings
    setting = f"Setting(steps={settings.steps}, scale={settings.scale!r})"
    return PYTHON % {
        "model": repr(settings.model),
        "setting": setting,
        "tags": repr(order.tags),
        "judge": repr(MODELS[model.name].judge),
        "techniques": repr(order.text),
        "images": order.images,
        "seed": settings.seed,
        "prompts": order.prompts,
    }


PYTHON = """\
from pathlib import Path

from diffalign.core.registry import parse
from diffalign.eval.benchmarks import named
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import Plan, generate
from diffalign.eval.report import report
from diffalign.eval.results import columns
from diffalign.eval.scorers import load_scorer
from diffalign.eval.scoring import pictures_of, score
from diffalign.generate.models import Setting, open_model

model = open_model(%(model)s, %(setting)s)
benchmark, judge = named("geneval", %(tags)s), load_scorer(%(judge)s, "cpu")
place = Path("evaluated")
for name, techniques in (("plain", ()), ("techniques", parse(%(techniques)s))):
    plan = Plan(benchmark, model, techniques, samples=%(images)s, seed=%(seed)s)
    folder = RunFolder.begin(place / name, plan.settings())
    generate(plan, folder, benchmark.spread(%(prompts)s))
    score(judge, folder, pictures_of(folder))
numbers, files = report(columns([place / "plain", place / "techniques"]), place / "report")
print(numbers["comparisons"], *files, sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of the tab."""

    techniques: gr.Textbox
    category: gr.Dropdown
    prompts: gr.Slider
    images: gr.Slider
    sampling: Sampling

    @property
    def fields(self) -> Fields:
        """Those that stand in the address: all."""
        names = ("techniques", "category", "prompts", "images")
        components = {name: getattr(self, name) for name in names}
        return Fields("evaluate", {**components, **self.sampling.components})

    def order(self, values: Values) -> Order:
        """What the fields ask for. Raises: ``gr.Error`` for what cannot be used."""
        text = short(values[self.techniques] or "", "Techniques").strip()
        if not text:
            raise refusal("Name techniques to compare with the plain model, like apg:eta=0.5.")
        try:
            techniques = parse(text)
        except (ValueError, TypeError) as error:
            raise refusal(error) from error
        return Order(
            text,
            techniques,
            str(values[self.category]),
            whole(values[self.prompts], "Prompts", 2, PROMPTS),
            whole(values[self.images], "Images of a prompt", 1, IMAGES),
            self.sampling.read(values),
        )


def form(shelf: Shelf) -> Form:
    """Draw the fields here."""
    gr.Markdown(
        "The plain model and the same with techniques, on prompts of GenEval and the same noise, "
        "judged by the detector that ships with the model."
    )
    techniques = gr.Textbox(
        "apg",
        label="Techniques in the command line's form",
        placeholder="interval-cfg:stop=0.8+pladis",
        max_length=TEXT,
    )
    category = gr.Dropdown([ALL, *TAGS], value=ALL, label="Prompts of")
    with gr.Row():
        prompts = gr.Slider(2, PROMPTS, value=12, step=1, label="Prompts", min_width=150)
        images = gr.Slider(1, IMAGES, value=2, step=1, label="Images of each", min_width=150)
    fields = Form(techniques, category, prompts, images, sampling(shelf))
    fields.sampling.follow(shelf, {}, None)
    return fields


@dataclass(frozen=True, slots=True)
class Frame:
    """The components that show a finding."""

    table: gr.Dataframe
    text: gr.Textbox
    report: gr.HTML
    file: gr.DownloadButton
    python: gr.Code
    shell: gr.Code

    @property
    def components(self) -> list[Component]:
        """All of them."""
        return [getattr(self, name) for name in self.__slots__]


def framed(page: str) -> str:
    """A page in a frame of its own, which cannot reach the page around it."""
    return (
        '<iframe title="report" sandbox="allow-scripts" class="report" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
    )


def frame() -> Frame:
    """Draw the components here."""
    table = gr.Dataframe(headers=HEADS, label="Scores", interactive=False, wrap=True, type="array")
    text = gr.Textbox(label="The difference", lines=2, max_lines=5)
    file = gr.DownloadButton("Download the report", visible=False, size="sm")
    view = gr.HTML(label="The report")
    return Frame(table, text, view, file, *code())


def tab(shelf: Shelf, desk: Desk) -> Fields:
    """Lay out the tab, and connect it."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = form(shelf)
            button = buttons("Evaluate", desk)
        with gr.Column(scale=3, min_width=320):
            shown = frame()

    def run(
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Outputs]:
        order = fields.order(values)

        def work(run: Run[Finding]) -> None:
            evaluate(order, shelf, run)

        for finding in desk.run(visitor_of(request), work, bar(progress)):
            with tempfile.TemporaryDirectory(prefix="diffalign-report-") as place:
                file = Path(place) / "report.html"
                file.write_text(finding.page, encoding="utf-8")
                yield {
                    shown.table: [list(row) for row in finding.rows],
                    shown.text: finding.text,
                    shown.report: framed(finding.page),
                    shown.file: gr.DownloadButton(value=str(file), visible=True),
                    shown.python: finding.python,
                    shown.shell: finding.shell,
                }

    button.click(
        run,
        set(fields.fields.components.values()),
        shown.components,
        api_name="evaluate",
        concurrency_limit=None,
        show_progress_on=[shown.text],
    )
    return fields.fields
