"""What ``fit`` and ``calibrate`` share: many prompts, one image each, and one result at a path of
its own."""

from __future__ import annotations

import shlex
from dataclasses import replace

from diffalign.cli.arguments import Options
from diffalign.cli.problem import BadInput
from diffalign.cli.request import Request, check_numbers, prepare, read_prompts
from diffalign.core.technique import Technique


def spread(prompts: tuple[str, ...], count: int) -> list[str]:
    """``count`` prompts: evenly spaced ones where there are more, all of them again and again where
    there are fewer."""
    return [
        prompts[i * len(prompts) // count if count < len(prompts) else i % len(prompts)]
        for i in range(count)
    ]


def prepare_measurement(options: Options, technique: Technique) -> Request:
    """The checked request for ``options.count`` images, those of GenEval's prompts unless there is
    a file of others.

    ``technique`` may refuse the model; ``options.output`` names the file to be written. Raises
    ``BadInput``.
    """
    check_numbers(options)
    if options.prompts_file is None:
        from diffalign.tasks.geneval.verdict import prompts

        texts = tuple(str(entry["prompt"]) for entry in prompts())
    else:
        texts = read_prompts(options)
    output = options.output
    if not output.name or output.is_dir():
        raise BadInput(f"--output must name a file; {str(output)!r} is a folder.")
    plain = replace(
        options,
        prompt=spread(texts, options.count),
        prompts_file=None,
        count=1,
        output=output.parent,
    )
    return prepare(plain, (technique,))


def repeated(request: Request, options: Options) -> str:
    """The options that repeat the setting of ``request``, for the line that says how to use a
    result."""
    model = request.model
    words = ["--model", model.name, "--steps", str(model.steps), "--scale", f"{model.scale:g}"]
    for name, value in (
        ("scheduler", options.scheduler),
        ("size", options.size),
        ("negative-prompt", options.negative_prompt),
    ):
        words += [f"--{name}", value] if value else []
    return shlex.join(words)
