"""``diffalign demo``: one official GenEval prompt of each category, plain guidance beside
AdaptiveGuidance, on the embedded model."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli import arguments
from diffalign.cli.problem import command


def prompts_of(nth: int) -> list[str]:
    """Official prompt number ``nth`` of each category, in the categories' order; counting on from
    the start where a category is shorter."""
    from diffalign.tasks.geneval.verdict import TAGS, prompts

    groups = [[str(entry["prompt"]) for entry in prompts() if entry["tag"] == tag] for tag in TAGS]
    return [group[nth % len(group)] for group in groups]


@command
@arguments.shared(("output", "seed", "json", "quiet"), output=Path("outputs/demo"))
def demo(
    options: arguments.Options,
    nth: Annotated[int, typer.Option(min=0, help="Which official prompt of each category.")] = 0,
) -> None:
    """Plain guidance beside AdaptiveGuidance: a contact sheet and what it cost."""
    from diffalign.cli.compare import run

    prompts = prompts_of(nth)
    options = dataclasses.replace(
        options, prompt=prompts, technique=["adaptive-guidance"], batch=len(prompts)
    )
    run(options, title="GenEval prompts on the embedded model")
