"""``diffalign eval``: a benchmark from prompts to a report, at once or in three separate steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from diffalign.cli import arguments, show
from diffalign.cli.plan import (
    NAMES,
    WHAT,
    Engine,
    RunOptions,
    Shard,
    Workers,
    check_engine,
    check_scorer,
    device_of,
    driver_device,
    items_of,
    option,
    plan_of,
    usual_scorer,
)
from diffalign.cli.problem import BadInput, checking, command, complain
from diffalign.cli.request import writable

if TYPE_CHECKING:
    from diffalign.core.types import Json
    from diffalign.eval.benchmarks import Item
    from diffalign.eval.cluster import Work
    from diffalign.eval.folder import RunFolder
    from diffalign.eval.generation import Plan
    from diffalign.eval.scorers import Scorer


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


def counter(step: Callable[[], None] | None, each: int = 1) -> Callable[[int], None]:
    """What counts several steps at once, ``each`` for one."""

    def count(number: int) -> None:
        for _ in range(number * each):
            if step is not None:
                step()

    return count


def make(options: RunOptions, plan: Plan, scorer: str = "") -> RunFolder:
    """The images of this process's part. Actors of Ray score theirs too, if there is a
    ``scorer``."""
    import shlex
    import sys

    from diffalign.eval.cluster import spread
    from diffalign.eval.folder import RunFolder
    from diffalign.eval.generation import generate

    items = items_of(options, plan)
    words = shlex.join(["diffalign", *sys.argv[1:]])
    with show.progress(len(items) * plan.samples, options.quiet) as bar:
        step = bar("images")
        if options.engine == "ray":
            spread(
                partial(making, options, words, scorer, Path.cwd()),
                items,
                options.workers,
                accelerator=options.device != "cpu",
                progress=counter(step, plan.samples),
            )
            return RunFolder.open(options.output)
        folder = RunFolder.begin(options.output, plan.settings())
        generate(plan, folder, items, command=words, progress=counter(step))
    return folder


def making(options: RunOptions, words: str, scorer: str, place: Path) -> Work:
    """In an actor of Ray, what makes a unit and has ``scorer`` score it; ``place``: the folder of
    the program."""
    import os

    from diffalign.eval.files import RunError
    from diffalign.eval.folder import RunFolder
    from diffalign.eval.generation import generate

    os.chdir(place)
    try:
        plan = plan_of(options, options.device)
    except BadInput as error:
        raise RunError(str(error)) from error
    folder = RunFolder.begin(options.output, plan.settings())
    mark = judging(options.output, scorer, options.device) if scorer else None

    def unit(item: Item) -> None:
        generate(plan, folder, [item], command=words)
        if mark is not None:
            mark(item)

    return unit


def judging(path: Path, name: str, device: str) -> Work:
    """In an actor of Ray, what scores a unit of the run in ``path``."""
    from diffalign.eval.files import RunError
    from diffalign.eval.folder import RunFolder
    from diffalign.eval.scorers import load_scorer
    from diffalign.eval.scoring import check, pictures_of, score_units
    from diffalign.generate.models import place

    device, _ = place(device, None)
    try:
        scorer = load_scorer(name, device)
    except ValueError as error:
        raise RunError(str(error)) from error
    check(scorer)
    folder = RunFolder.open(path)
    return lambda item: score_units(scorer, folder, pictures_of(folder, item), device)


def judge(
    folder: RunFolder,
    scorer: Scorer,
    items: Sequence[Item],
    device: str,
    quiet: bool,
    workers: int = 0,
) -> tuple[int, int]:
    """Score what is finished of ``items``, on ``workers`` actors of Ray if any; prompts with
    scores, of all and now. ``device``: as the user names it."""
    from diffalign.eval.cluster import spread
    from diffalign.eval.scoring import Scores, pictures_of, score
    from diffalign.generate.models import place

    pictures = pictures_of(folder)
    scores = Scores.begin(folder.path, scorer)
    mine = {item.index for item in items}
    missing = [
        p for p in pictures if p.item.index in mine and scores.read(p.item, p.hashes) is None
    ]
    with show.progress(sum(len(p.files) for p in missing), quiet) as bar:
        step = bar(scorer.name)
        if workers:
            spread(
                partial(judging, folder.path.absolute(), scorer.name, device),
                [p.item for p in missing],
                workers,
                accelerator=device != "cpu",
                progress=counter(step, folder.samples),
            )
        else:
            target = place(device_of(device), None)[0]
            score(scorer, folder, missing, device=target, progress=counter(step))
    return sum(scores.read(p.item, p.hashes) is not None for p in pictures), len(missing)


@evaluate.command()
@command
@arguments.shared(
    NAMES, group=RunOptions, benchmark=arguments.REQUIRED, output=Path("outputs/eval")
)
def run(options: RunOptions) -> None:
    """Make the images, score them and write the report; the same command goes on after a stop."""
    from diffalign.eval.scorers import load_scorer
    from diffalign.eval.scoring import check

    plan = plan_of(options, driver_device(options.engine, options.device))
    items = plan.benchmark.spread(options.limit)
    with failing(f"what is finished is kept in {options.output}"):
        with checking():
            scorer = load_scorer(options.scorer or usual_scorer(plan), str(plan.model.pipe.device))
        check_scorer(scorer, items, plan.search.reward if plan.search else None)
        check(scorer)
        folder = make(options, plan, scorer.name)
        count, _ = judge(folder, scorer, items_of(options, plan), options.device, options.quiet)
        if count >= len(items):
            write_report([options.output], options.output, scorer.name, options)
        elif not options.quiet:
            show.text(
                f"{count} of {len(items)} prompts are finished in {options.output}; `diffalign "
                "eval report FOLDER...` joins the parts when all are."
            )


@evaluate.command()
@command
@arguments.shared(
    NAMES,
    group=RunOptions,
    without=("json", "scorer"),
    benchmark=arguments.REQUIRED,
    output=Path("outputs/eval"),
)
def generate(options: RunOptions) -> None:
    """Make the images of a run and nothing else."""
    plan = plan_of(options, driver_device(options.engine, options.device))
    with failing(f"what is finished is kept in {options.output}"):
        folder = make(options, plan)
    if not options.quiet:
        count = sum(1 for _ in folder.entries())
        show.text(f"{count} prompts are finished in {options.output}")


@evaluate.command()
@command
@arguments.shared(("device", "quiet"))
def score(
    options: arguments.Options,
    folder: Annotated[Path, typer.Argument(help="A run, or images that another tool made.")],
    scorer: Annotated[
        str | None,
        option(
            WHAT,
            "Who judges the images; the judge of an embedded model, or emoji-judge, if left out.",
            "--scorer",
            "--detector",
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        option(WHAT, "Of images of another tool: geneval or compbench.", "--benchmark"),
    ] = None,
    output: Annotated[
        Path | None,
        option(WHAT, "Where the scores of such images go.", "--output", "-o"),
    ] = None,
    shard: Shard = None,
    engine: Engine = "local",
    workers: Workers = 2,
) -> None:
    """Score the images of a run, or a folder in GenEval's or T2I-CompBench's own layout."""
    from diffalign.embedded.load import judge_of
    from diffalign.eval.folder import RunFolder, Share
    from diffalign.eval.foreign import adopt
    from diffalign.eval.scorers import load_scorer
    from diffalign.generate.models import place

    check_engine(engine, workers)
    if (benchmark is None) != (output is None):
        raise BadInput(
            "--benchmark and --output go together: they are for images of another tool; the "
            "scores of a run stay in its folder."
        )
    with failing(f"what is finished is kept in {output or folder}"):
        with checking():
            share = Share.of(shard)
            device, _ = place(driver_device(engine, options.device), None)
            who = load_scorer(scorer, device) if scorer else None
        if benchmark is None or output is None:
            target = RunFolder.open(folder)
            usual = judge_of(target.settings["model"]["name"]) or "emoji-judge"
        else:
            target, usual = adopt(folder, benchmark, writable(output)), "emoji-judge"
        who = who or load_scorer(usual, device)
        reward = (target.settings.get("search") or {}).get("reward")
        items = [item for item, _ in target.entries()]
        check_scorer(who, items, reward)
        actors = workers if engine == "ray" else 0
        count, new = judge(
            target, who, share.of_items(items), options.device, options.quiet, actors
        )
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
        option(WHAT, "Folder of the report; the first run if left out.", "--output", "-o"),
    ] = None,
    scorer: Annotated[str, option(WHAT, "Whose scores, if there are several.", "--scorer")] = "",
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
        str, option(WHAT, "emoji-clip, or a CLIP by folder or hub id.", "--encoder")
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
