"""What ``diffalign eval`` is asked for: its options, and the plan that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffalign.cli import arguments
from diffalign.cli.problem import BadInput, checking
from diffalign.cli.request import check_numbers, read_size, techniques_of, writable

if TYPE_CHECKING:
    from diffalign.eval.benchmarks import Benchmark, Item
    from diffalign.eval.folder import Share
    from diffalign.eval.generation import Plan, Search
    from diffalign.eval.scorers import Scorer

WHAT, HOW, WHERE = "What to evaluate", "How to search", "How to share the work"
ENGINES = ("local", "ray")


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


def option(panel: str, help: str, *names: str) -> object:
    """An option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


Shard = Annotated[
    str | None,
    option(WHERE, "0/2 is the first of two machines; diffalign eval report joins.", "--shard"),
]
Engine = Annotated[
    str,
    option(WHERE, "local: this process, or those of accelerate launch; or ray.", "--engine"),
]
Workers = Annotated[int, option(WHERE, "Of ray: how many hold a model.", "--workers")]


@dataclass(frozen=True, slots=True)
class RunOptions(arguments.Options):
    """The options of a run, as the user gave them."""

    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK",
            help="geneval, compbench, a FILE.jsonl of prompts, or a FILE.yaml of options.",
            callback=settings_file,
            is_eager=True,
        ),
    ] = "geneval"
    samples: Annotated[int, option(WHAT, "Images of a prompt.", "--samples")] = 4
    limit: Annotated[
        int | None, option(WHAT, "Only so many prompts, evenly spaced.", "--limit")
    ] = None
    category: Annotated[
        list[str] | None, option(WHAT, "Only this one; repeatable.", "--category")
    ] = None
    scorer: Annotated[
        str | None,
        option(
            WHAT,
            "Who judges the images; by model and benchmark if left out.",
            "--scorer",
            "--detector",
        ),
    ] = None
    align: Annotated[
        str | None, option(HOW, "A method makes every image; see diffalign methods.", "--align")
    ] = None
    reward: Annotated[
        str | None,
        option(HOW, "The score that it raises; an embedded model's if left out.", "--reward"),
    ] = None
    budget: Annotated[str | None, option(HOW, "Of each image, like nfe=400.", "--budget")] = None
    shard: Shard = None
    engine: Engine = "local"
    workers: Workers = 2


NAMES = tuple(
    name
    for name in (field.name for field in fields(RunOptions))
    if name not in ("prompt", "prompts_file", "count", "batch")
)
"""The options of a run that makes images."""


def check_engine(engine: str, workers: int) -> None:
    """Raise ``BadInput`` where the work cannot be shared so."""
    import os

    if engine not in ENGINES:
        raise BadInput(f"--engine must be {' or '.join(ENGINES)}; got {engine!r}.")
    if workers < 1:
        raise BadInput(f"--workers must be at least 1; got {workers}.")
    if engine != "ray":
        return
    if find_spec("ray") is None:
        raise BadInput("--engine ray needs Ray; install it by pip install 'diffalign[ray]'.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput(
            "--engine ray starts its own processes; run it without accelerate launch or torchrun."
        )


def device_of(name: str) -> str:
    """The device of this process: of several on one host each takes its own accelerator."""
    import os

    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    if name != "auto" or not rank.isdecimal() or not torch.cuda.is_available():
        return name
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def plan_of(options: RunOptions, device: str) -> Plan:
    """What is to be made, checked, with the model loaded on ``device``."""
    from diffalign.eval.generation import Plan
    from diffalign.generate.models import Setting, open_model

    check_numbers(options)
    check_engine(options.engine, options.workers)
    for name, value in (("samples", options.samples), ("limit", options.limit)):
        if value is not None and value < 1:
            raise BadInput(f"--{name} must be at least 1; got {value}.")
    techniques = techniques_of(options.technique)
    with checking():
        benchmark, search = _benchmark_of(options), _search_of(options)
        share_of(options)
    writable(options.output)
    setting = Setting(
        steps=options.steps,
        scale=options.scale,
        negative_prompt=options.negative_prompt,
        size=read_size(options.size),
        scheduler=options.scheduler,
        dtype=options.dtype,
        device=device,
    )
    with checking():
        model = open_model(options.model, setting, (techniques,))
    if model.kind == "embedded" and benchmark.name == "compbench":
        benchmark = _drawable(benchmark)
    return Plan(benchmark, model, techniques, options.samples, options.seed, search)


def share_of(options: RunOptions) -> Share:
    """The part of this machine, and of this process on it."""
    from diffalign.eval.folder import Share

    return Share.of(options.shard)


def items_of(options: RunOptions, plan: Plan) -> list[Item]:
    """The prompts of this process's part."""
    return share_of(options).of_items(plan.benchmark.spread(options.limit))


def _benchmark_of(options: RunOptions) -> Benchmark:
    from diffalign.eval.benchmarks import named

    benchmark = named(options.benchmark, options.category or ())
    if benchmark.name == "compbench" and options.samples > benchmark.samples:
        raise BadInput(
            f"--samples must be at most {benchmark.samples} for compbench, whose file names number "
            f"ten images of a prompt; got {options.samples}."
        )
    return benchmark


def _search_of(options: RunOptions) -> Search | None:
    from diffalign.cli.align import read_budget, usual_reward
    from diffalign.eval.generation import Search

    if options.align is None:
        if options.budget is not None:
            raise BadInput("--budget limits a search; give --align METHOD too.")
        return None
    reward = options.reward or usual_reward(options.model)
    search = Search(options.align, reward, read_budget(options.budget))
    search.check()
    return search


def _drawable(benchmark: Benchmark) -> Benchmark:
    """The prompts that an embedded model can draw."""
    from diffalign.eval.scorers.world import knows

    count, total = sum(map(knows, benchmark.items)), len(benchmark.items)
    part = f"{count} of {total} prompts, whose nouns the embedded world knows"
    benchmark = benchmark.where(knows, part)
    if not benchmark.items:
        raise BadInput("no prompt of these categories can be drawn by this model.")
    return benchmark


def usual_scorer(plan: Plan) -> str:
    """The scorer of a run that names none."""
    from diffalign.embedded.load import judge_of

    if judge := judge_of(plan.model.name):
        return judge
    if any("questions" in item.facts for item in plan.benchmark.items):
        return "blip-vqa"
    return "compbench" if plan.benchmark.name == "compbench" else "mask2former"


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


def driver_device(engine: str, device: str) -> str:
    """The device of the process that checks a run; actors of Ray take the accelerators."""
    return "cpu" if engine == "ray" and device == "auto" else device_of(device)
