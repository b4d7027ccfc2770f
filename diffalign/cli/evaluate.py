"""``diffalign eval``: a benchmark from prompts to a report, at once or in three separate steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, checking, command, complain
from diffalign.cli.request import check_numbers, read_size, techniques_of, writable

if TYPE_CHECKING:
    from diffalign.core.types import Json
    from diffalign.eval.benchmarks import Item
    from diffalign.eval.folder import RunFolder, Share
    from diffalign.eval.generation import Plan
    from diffalign.eval.scorers import Scorer

WHAT, HOW, WHERE = "What to evaluate", "How to search", "How to share the work"


class Commands(TyperGroup):
    """``diffalign eval geneval`` is short for ``diffalign eval run geneval``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of the first word, ``run`` where it is none."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


evaluate = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help=(
        "Measure a model with techniques on a benchmark: diffalign eval geneval, "
        "diffalign eval compbench, diffalign eval FILE.jsonl, diffalign eval FILE.yaml."
    ),
)


def settings_file(context: typer.Context, name: str) -> str:
    """The benchmark; of a YAML file its values become the defaults of the other options."""
    if not name.endswith((".yaml", ".yml")):
        return name
    import yaml

    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{name!r} cannot be read: {error}") from error
    known = {parameter.name for parameter in context.command.params}
    if not isinstance(values, dict) or not isinstance(values.get("benchmark"), str):
        raise typer.BadParameter(f"{name!r} must hold options by name, with benchmark: geneval.")
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(options) - known)
    if unknown:
        from diffalign.core.errors import nearest

        near = nearest(unknown[0], [str(key) for key in known])
        raise typer.BadParameter(f"{name!r}: no option {unknown[0]!r}. Nearest: {near}.")
    context.default_map = {**(context.default_map or {}), **options}
    return str(options["benchmark"])


def _option(panel: str, help: str, *names: str) -> object:
    return typer.Option(*names, help=help, rich_help_panel=panel)


Name = Annotated[
    str,
    typer.Argument(
        metavar="BENCHMARK",
        help="geneval, compbench, a FILE.jsonl of prompts, or a FILE.yaml of options.",
        callback=settings_file,
        is_eager=True,
    ),
]
Samples = Annotated[int, _option(WHAT, "Images of a prompt.", "--samples")]
Limit = Annotated[int | None, _option(WHAT, "Only so many prompts, evenly spaced.", "--limit")]
Category = Annotated[list[str] | None, _option(WHAT, "Only this one; repeatable.", "--category")]
ScorerName = Annotated[
    str | None,
    _option(WHAT, "Who judges the images; by model and benchmark if left out.", "--scorer"),
]
Align = Annotated[
    str | None, _option(HOW, "A method makes every image; see diffalign methods.", "--align")
]
Reward = Annotated[str, _option(HOW, "The score that it raises.", "--reward")]
Limits = Annotated[str | None, _option(HOW, "Of each image, like nfe=400.", "--budget")]
Shard = Annotated[
    str | None,
    _option(WHERE, "0/2 is the first of two machines; diffalign eval report joins.", "--shard"),
]
SHARED = (
    "model",
    "negative_prompt",
    "seed",
    "size",
    "technique",
    "steps",
    "scale",
    "scheduler",
    "dtype",
    "device",
    "output",
    "json",
    "quiet",
)


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of a run beside those that all commands share."""

    benchmark: str
    samples: int
    limit: int | None
    category: list[str] | None
    align: str | None
    reward: str
    budget: str | None
    shard: str | None


@contextmanager
def failing(what: str = "") -> Iterator[None]:
    """Inside, a run that had to stop ends the program with one line and exit code 1."""
    from diffalign.eval.files import RunError

    try:
        yield
    except RunError as error:
        complain(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what or "what is finished is kept") from None


def device_of(name: str) -> str:
    """The device of this process: of several on one host each takes its own accelerator."""
    import os

    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    if name != "auto" or not rank.isdecimal() or not torch.cuda.is_available():
        return name
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def plan_of(options: arguments.Options, wish: Wish) -> tuple[Plan, Share]:
    """What is to be made, checked, with the model loaded, and this process's part of it."""
    from diffalign.cli.align import read_budget
    from diffalign.eval.benchmarks import named
    from diffalign.eval.folder import Share
    from diffalign.eval.generation import Plan, Search
    from diffalign.eval.scorers.world import knows
    from diffalign.generate.models import Setting, open_model

    check_numbers(options)
    for name, value in (("samples", wish.samples), ("limit", wish.limit)):
        if value is not None and value < 1:
            raise BadInput(f"--{name} must be at least 1; got {value}.")
    techniques = techniques_of(options.technique)
    with checking():
        share = Share.of(wish.shard)
        benchmark = named(wish.benchmark, wish.category or ())
        search = None
        if wish.align is not None:
            search = Search(wish.align, wish.reward, read_budget(wish.budget))
            search.check()
        elif wish.budget is not None:
            raise BadInput("--budget limits a search; give --align METHOD too.")
    if benchmark.name == "compbench" and wish.samples > benchmark.samples:
        raise BadInput(
            f"--samples must be at most {benchmark.samples} for compbench, whose file names number "
            f"ten images of a prompt; got {wish.samples}."
        )
    writable(options.output)
    setting = Setting(
        steps=options.steps,
        scale=options.scale,
        negative_prompt=options.negative_prompt,
        size=read_size(options.size),
        scheduler=options.scheduler,
        dtype=options.dtype,
        device=device_of(options.device),
    )
    with checking():
        model = open_model(options.model, setting, (techniques,))
    if model.kind == "embedded" and benchmark.name == "compbench":
        total = len(benchmark.items)
        known = benchmark.where(knows, "")
        benchmark = benchmark.where(
            knows, f"{len(known.items)} of {total} prompts, whose nouns the embedded world knows"
        )
    if not benchmark.items:
        raise BadInput("no prompt of these categories can be drawn by this model.")
    return Plan(benchmark, model, techniques, wish.samples, options.seed, search), share


def make(options: arguments.Options, wish: Wish, plan: Plan, share: Share) -> RunFolder:
    """The images of this process's part."""
    import shlex
    import sys

    from diffalign.eval.folder import RunFolder
    from diffalign.eval.generation import generate as run

    folder = RunFolder.begin(options.output, plan.settings())
    total = len(share.of_items(plan.benchmark.spread(wish.limit))) * plan.samples
    with show.progress(total, options.quiet) as bar:
        count = counter(bar("images"))
        words = shlex.join(["diffalign", *sys.argv[1:]])
        run(plan, folder, share=share, limit=wish.limit, command=words, progress=count)
    return folder


def counter(step: Callable[[], None] | None) -> Callable[[int], None]:
    """What counts several steps at once."""

    def count(number: int) -> None:
        for _ in range(number):
            if step is not None:
                step()

    return count


def judge(
    folder: RunFolder, scorer: Scorer, share: Share, device: str, quiet: bool
) -> tuple[int, int]:
    """Score this process's part; prompts with scores, of all and now."""
    from diffalign.eval.results import image_root
    from diffalign.eval.scoring import Scores, pictures_of, score

    pictures = pictures_of(folder)
    total = sum(len(p.files) for p in pictures if p.item.index % share.count == share.index)
    with show.progress(total, quiet) as bar:
        new = score(
            scorer,
            folder.path,
            image_root(folder),
            pictures,
            share=share,
            device=device,
            progress=counter(bar(scorer.name)),
        )
    place = Scores.begin(folder.path, scorer)
    return sum(place.read(p.item, p.hashes) is not None for p in pictures), new


def usual_scorer(plan: Plan) -> str:
    """The scorer of a run that names none."""
    from diffalign.embedded.load import MODELS

    if plan.model.kind == "embedded" and MODELS[plan.model.name].judge:
        return MODELS[plan.model.name].judge
    if any("questions" in item.facts for item in plan.benchmark.items):
        return "blip-vqa"
    return "compbench" if plan.benchmark.name == "compbench" else "mask2former"


@evaluate.command()
@command
@arguments.shared(SHARED, output=Path("outputs/eval"))
def run(
    options: arguments.Options,
    benchmark: Name,
    samples: Samples = 4,
    limit: Limit = None,
    category: Category = None,
    scorer: ScorerName = None,
    align: Align = None,
    reward: Reward = "emoji-clip",
    budget: Limits = None,
    shard: Shard = None,
) -> None:
    """Make the images, score them and write the report; the same command goes on after a stop."""
    from diffalign.eval.scorers import load_scorer

    wish = Wish(benchmark, samples, limit, category, align, reward, budget, shard)
    plan, share = plan_of(options, wish)
    items = plan.benchmark.spread(limit)
    with failing(f"what is finished is kept in {options.output}"):
        with checking():
            who = load_scorer(scorer or usual_scorer(plan), str(plan.model.pipe.device))
        check_scorer(who, items, plan.search.reward if plan.search else None)
        folder = make(options, wish, plan, share)
        count, _ = judge(folder, who, share, plan.model.pipe.device.type, options.quiet)
        if count >= len(items):
            write_report([options.output], options.output, who.name, options)
        elif not options.quiet:
            show.text(
                f"{count} of {len(items)} prompts are finished in {options.output}; `diffalign "
                "eval report FOLDER...` joins the parts when all are."
            )


def check_scorer(scorer: Scorer, items: Sequence[Item], reward: str | None) -> None:
    """Raise ``BadInput`` where the scorer cannot judge the prompts, or was optimised."""
    if reward == scorer.name:
        raise BadInput(
            f"--reward {reward} is also the judge of this run: what is optimised is no test. Give "
            "another --reward, or another --scorer such as emoji-judge-audit."
        )
    unknown = [item for item in items if not scorer.knows(item)]
    if unknown:
        raise BadInput(
            f"--scorer {scorer.name} cannot judge {len(unknown)} of {len(items)} prompts, first "
            f"{unknown[0].prompt!r} ({unknown[0].tag})."
        )


@evaluate.command()
@command
@arguments.shared(SHARED, without=("json",), output=Path("outputs/eval"))
def generate(
    options: arguments.Options,
    benchmark: Name,
    samples: Samples = 4,
    limit: Limit = None,
    category: Category = None,
    align: Align = None,
    reward: Reward = "emoji-clip",
    budget: Limits = None,
    shard: Shard = None,
) -> None:
    """Make the images of a run and nothing else."""
    wish = Wish(benchmark, samples, limit, category, align, reward, budget, shard)
    plan, share = plan_of(options, wish)
    with failing(f"what is finished is kept in {options.output}"):
        folder = make(options, wish, plan, share)
    if not options.quiet:
        done = sum(1 for _ in folder.entries())
        show.text(f"{done} prompts are finished in {options.output}")


@evaluate.command()
@command
@arguments.shared(("device", "quiet"))
def score(
    options: arguments.Options,
    folder: Annotated[Path, typer.Argument(help="A run, or images that another tool made.")],
    scorer: Annotated[str, _option(WHAT, "Who judges the images.", "--scorer")] = "emoji-judge",
    benchmark: Annotated[
        str | None,
        _option(WHAT, "Of images of another tool: geneval or compbench.", "--benchmark"),
    ] = None,
    output: Annotated[
        Path | None,
        _option(WHAT, "Where the scores of such images go.", "--output", "-o"),
    ] = None,
    shard: Shard = None,
) -> None:
    """Score the images of a run, or a folder in GenEval's or T2I-CompBench's own layout."""
    from diffalign.eval.folder import RunFolder, Share
    from diffalign.eval.foreign import adopt
    from diffalign.eval.scorers import load_scorer
    from diffalign.generate.models import place

    if (benchmark is None) != (output is None):
        raise BadInput(
            "--benchmark and --output go together: they are for images of another tool; the "
            "scores of a run stay in its folder."
        )
    with failing(f"what is finished is kept in {output or folder}"):
        with checking():
            share, (device, _) = Share.of(shard), place(device_of(options.device), None)
            who = load_scorer(scorer, device)
        if benchmark is None or output is None:
            target = RunFolder.open(folder)
        else:
            target = adopt(folder, benchmark, writable(output))
        reward = (target.settings.get("search") or {}).get("reward")
        check_scorer(who, [item for item, _ in target.entries()], reward)
        count, new = judge(target, who, share, device, options.quiet)
    if not options.quiet:
        show.text(f"{count} prompts are scored in {target.path}, {new} of them now")


@evaluate.command()
@command
@arguments.shared(("json", "quiet"))
def report(
    options: arguments.Options,
    folders: Annotated[
        list[Path],
        typer.Argument(help="Runs to compare; the parts of a run made by --shard are joined."),
    ],
    output: Annotated[
        Path | None,
        _option(WHAT, "Folder of the report; the first run if left out.", "--output", "-o"),
    ] = None,
    scorer: Annotated[str, _option(WHAT, "Whose scores, if there are several.", "--scorer")] = "",
) -> None:
    """Join the parts of runs, compare runs, and write numbers, tables and a page."""
    with failing():
        write_report(folders, output or folders[0], scorer, options)


@evaluate.command()
@command
@arguments.shared(("device", "json"))
def frechet(
    options: arguments.Options,
    one: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run, or a folder of images.")],
    other: Annotated[Path, typer.Argument(metavar="FOLDER", help="Another one.")],
    encoder: Annotated[
        str, _option(WHAT, "emoji-clip, or a CLIP by folder or hub id.", "--encoder")
    ] = "emoji-clip",
) -> None:
    """The Fréchet distance of two sets of images, in the features of an encoder."""
    from dataclasses import asdict

    from diffalign.eval import encoders
    from diffalign.eval.frechet import frechet as distance_of
    from diffalign.eval.generation import one_thread
    from diffalign.generate.models import place

    with failing(), one_thread("cpu"):
        with checking():
            device, _ = place(options.device, None)
            encode, facts = encoders.encoder(encoder, device)
        sets = [encoders.features_of(encoders.images_in(folder), encode) for folder in (one, other)]
        result = distance_of(*sets)
    if options.json:
        show.text(show.to_json({**asdict(result), "encoder": facts}))
    else:
        show.text(
            f"Fréchet distance in {encoder}: {result.distance:.4f}, {result.low:.4f} to "
            f"{result.high:.4f} over resampled sets of {result.images[0]} and {result.images[1]} "
            "images"
        )


def write_report(
    folders: list[Path], output: Path, scorer: str, options: arguments.Options
) -> None:
    """Write a report and print what it says."""
    from diffalign.eval.report import report as files_of
    from diffalign.eval.results import columns

    numbers, files = files_of(columns(folders, scorer), output)
    if options.json:
        show.text(show.to_json(numbers))
    elif not options.quiet:
        print_numbers(numbers)
        show.text("\n".join(str(file) for file in files))


def print_numbers(numbers: Json) -> None:
    """The numbers of a report as tables."""
    from diffalign.eval.benchmarks import order_of
    from diffalign.eval.report import difference_text, number_text, spread_text

    results: dict[str, Json] = numbers["results"]
    tags = order_of([tag for result in results.values() for tag in result["tags"]])
    heads = [*tags, "mean", "overall", "NFE"]
    rows = []
    for label, result in results.items():
        cells = [spread_text(result["tags"].get(tag)) for tag in tags]
        cells += [spread_text(result["mean_of_tags"]), number_text(result["overall"])]
        rows.append([label, *cells, number_text(result["nfe"])])
        for text in result["warnings"]:
            complain(f"{label}: {text}", "warning")
        if result["incomplete"]:
            complain(f"{label}: no overall; {result['incomplete']}", "warning")
    show.table(["run", *heads], rows, numbers=heads)
    for entry in numbers["comparisons"]:
        show.text(
            f"{entry['b']} minus {entry['a']}: {difference_text(entry)}, p {entry['p_holm']:.4f}, "
            f"prompts won {entry['won']}, tied {entry['tied']}, lost {entry['lost']}"
        )
