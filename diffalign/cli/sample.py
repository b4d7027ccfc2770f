"""What ``fit`` and ``calibrate`` share: many prompts with a seed each, and one result at a path of
its own."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.cli.options import Options, read_numbers, read_prompts
from diffalign.cli.problem import BadInput
from diffalign.cli.request import Column, Request, prepare


def spread(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """``count`` prompts: evenly spaced ones where there are more, all of them again and again where
    there are fewer."""
    return tuple(
        prompts[i * len(prompts) // count if count < len(prompts) else i % len(prompts)]
        for i in range(count)
    )


def prepare_sample(options: Options, count: int, output: Path, technique: Any) -> Request:
    """The checked request for ``count`` images, those of GenEval's prompts unless there is a file
    of others, image i with seed + i.

    ``technique`` may refuse the model; ``output``: file to be, with or without its suffix. Raises
    ``BadInput``.
    """
    read_numbers(replace(options, count=count))
    if options.prompts_file is None:
        from diffalign.tasks.geneval.verdict import prompts

        texts = tuple(str(entry["prompt"]) for entry in prompts())
    else:
        texts = read_prompts(options)
    if not output.name or output.is_dir():
        raise BadInput(f"--output must name a file; {str(output)!r} is a folder.")
    plain = replace(options, prompts=spread(texts, count), prompts_file=None, output=output.parent)
    return prepare(plain, (Column("", (technique,)),))


def said_of(request: Request, options: Options) -> str:
    """The options that repeat the setting of ``request``, for the line that says how to use a
    result."""
    words = [
        "--model",
        request.model.name,
        "--steps",
        str(request.steps),
        "--scale",
        f"{request.model.scale(request.scale):g}",
    ]
    for name, value in (
        ("scheduler", options.scheduler),
        ("size", options.size),
        ("negative-prompt", options.negative_prompt),
    ):
        words += [f"--{name}", value] if value else []
    return shlex.join(words)
