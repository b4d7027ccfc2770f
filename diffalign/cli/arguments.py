"""The options that commands share: each stands here once, as the command line shows it."""

import copy
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

WHAT, HOW, WHERE = "What to make", "How to sample", "Where and how to run"
REQUIRED: object = inspect.Parameter.empty
"""Default of an option that the user must give."""


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


Json = Annotated[bool, _option(WHERE, "Print JSON and nothing else.", "--json")]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be made."""

    prompt: Annotated[
        list[str] | None, _option(WHAT, "A prompt; repeat for several.", "--prompt", "-p")
    ] = None
    model: Annotated[
        str,
        _option(
            WHAT,
            "Embedded name, folder, or hub id (owner/name; uses the network).",
            "--model",
            "-m",
        ),
    ] = "emoji"
    prompts_file: Annotated[Path | None, _option(WHAT, "Text file with one prompt a line.")] = None
    negative_prompt: Annotated[
        str | None, _option(WHAT, "What to avoid, for every prompt.", "--negative-prompt", "-n")
    ] = None
    count: Annotated[int, _option(WHAT, "Images per prompt.", "--count", "-c")] = 1
    seed: Annotated[
        int,
        _option(
            WHAT,
            "Base of all seeds; an image's own follows from it, its prompt and its number.",
            "--seed",
        ),
    ] = 0
    size: Annotated[
        str | None, _option(WHAT, "Pixels, like 512 or 768x512 (width x height).", "--size")
    ] = None


@dataclass(frozen=True, slots=True)
class Options(Subject):
    """The options that commands share, as the user gave them."""

    technique: Annotated[
        list[str] | None,
        _option(
            HOW,
            "name:key=value,key=value+name2, repeatable; see diffalign techniques.",
            "--technique",
            "-t",
        ),
    ] = None
    steps: Annotated[
        int | None,
        _option(HOW, "Sampling steps; the model's default if left out.", "--steps", "-s"),
    ] = None
    scale: Annotated[
        float | None,
        _option(HOW, "Guidance scale, 1 is off; the model's default if left out.", "--scale"),
    ] = None
    scheduler: Annotated[
        str | None,
        _option(HOW, "ddim, euler, euler-a, dpm++, heun, unipc, ...; the model's own if left out."),
    ] = None
    batch: Annotated[int, _option(WHERE, "Images per call of the pipeline.", "--batch", "-b")] = 4
    dtype: Annotated[
        str | None,
        _option(WHERE, "fp32, fp16 or bf16; fp32 on a CPU and bf16 elsewhere if left out."),
    ] = None
    device: Annotated[str, _option(WHERE, "auto, cpu, cuda, cuda:1, mps.")] = "auto"
    output: Annotated[
        Path,
        _option(WHERE, "Folder; files of the same name are replaced.", "--output", "-o"),
    ] = Path("outputs")
    json: Json = False
    quiet: Annotated[bool, _option(WHERE, "Print nothing but errors.", "--quiet", "-q")] = False


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def shared(
    names: Collection[str] = NAMES,
    *,
    group: type[Options] = Options,
    without: Collection[str] = (),
    help: Mapping[str, str] | None = None,
    **defaults: object,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets the options ``names`` but those ``without``, in the place of its first
    parameter, which is a ``group``.

    ``help`` and ``defaults`` are of this command where they differ from those of ``Options``.
    """
    hints = typing.get_type_hints(group, include_extras=True)
    usual = {field.name: field.default for field in dataclasses.fields(group)} | defaults
    names = [name for name in usual if name in names and name not in without]

    def parameter(name: str) -> inspect.Parameter:
        hint = hints[name]
        if help and name in help:
            kind, shown = typing.get_args(hint)
            shown = copy.copy(shown)
            shown.help = help[name]
            hint = Annotated[kind, shown]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=usual[name], annotation=hint
        )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            function(group(**{name: values.pop(name) for name in names}), **values)

        others = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        parameters = [parameter(name) for name in names]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
