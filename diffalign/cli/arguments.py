"""The options that commands share as the command line shows them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign.cli.options import Options

WHAT, HOW, WHERE = "What to make", "How to sample", "Where and how to run"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Embedded name, folder, or hub id (owner/name; uses the network).",
        rich_help_panel=WHAT,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="A prompt; repeat for several.", rich_help_panel=WHAT),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="Text file with one prompt a line.", rich_help_panel=WHAT)
]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt", "-n", help="What to avoid, for every prompt.", rich_help_panel=WHAT
    ),
]
Count = Annotated[
    int, typer.Option("--count", "-c", help="Images per prompt.", rich_help_panel=WHAT)
]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Image i of every prompt has seed SEED + i.", rich_help_panel=WHAT),
]
Size = Annotated[
    str | None,
    typer.Option(help="Pixels, like 512 or 768x512 (width x height).", rich_help_panel=WHAT),
]
Technique = Annotated[
    list[str] | None,
    typer.Option(
        "--technique",
        "-t",
        help="name:key=value,key=value+name2; `diffalign techniques` lists them. Repeatable.",
        rich_help_panel=HOW,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        "-s",
        help="Sampling steps; the model's default if left out.",
        rich_help_panel=HOW,
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--scale",
        help="Guidance scale, 1 is off; the model's default if left out.",
        rich_help_panel=HOW,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, euler, euler-a, dpm++, heun, unipc, ...; the model's own if left out.",
        rich_help_panel=HOW,
    ),
]
Batch = Annotated[
    int,
    typer.Option("--batch", "-b", help="Images per call of the pipeline.", rich_help_panel=WHERE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="fp32, fp16 or bf16; fp32 on a CPU and bf16 elsewhere if left out.",
        rich_help_panel=WHERE,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=WHERE)]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Folder; files of the same name are replaced.", rich_help_panel=WHERE
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else.", rich_help_panel=WHERE)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=WHERE)
]

SHARED: dict[str, Any] = {
    "prompt": Prompt,
    "model": Model,
    "prompts_file": PromptsFile,
    "negative_prompt": Negative,
    "steps": Steps,
    "scale": Scale,
    "seed": Seed,
    "count": Count,
    "batch": Batch,
    "size": Size,
    "scheduler": Scheduler,
    "dtype": Dtype,
    "device": Device,
    "output": Output,
}


def shared(*without: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets the options of ``SHARED`` in the place of its first parameter, ``without``
    some, with these ``defaults``."""
    usual = {
        "prompt": None,
        **{field.name: field.default for field in dataclasses.fields(Options)},
        **defaults,
    }
    names = [name for name in SHARED if name not in without]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            texts = {name: given.pop(name) for name in names}
            function(Options(prompts=tuple(texts.pop("prompt", None) or ()), **texts), **given)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        ours = [
            inspect.Parameter(name, kind, default=usual[name], annotation=SHARED[name])
            for name in names
        ]
        parameters = [*ours, *(parameter.replace(kind=kind) for parameter in own)]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
