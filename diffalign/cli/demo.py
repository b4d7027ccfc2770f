"""``make demo``: one official GenEval prompt of each category, plain guidance beside
AdaptiveGuidance, on the embedded model.

python -m diffalign.cli.demo [--output FOLDER] [--nth N]
"""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli import arguments as a
from diffalign.cli.problem import command

STEPS = 20


def prompts_of(nth: int) -> tuple[str, ...]:
    """Official prompt number ``nth`` of each category, in the categories' order; counting on from
    the start where a category is shorter."""
    from diffalign.tasks.geneval.verdict import TAGS, prompts

    groups = [[str(entry["prompt"]) for entry in prompts() if entry["tag"] == tag] for tag in TAGS]
    return tuple(group[nth % len(group)] for group in groups)


@command
def demo(
    output: a.Output = Path("outputs/demo"),
    nth: Annotated[int, typer.Option(min=0, help="Which official prompt of each category.")] = 0,
    seed: a.Seed = 0,
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """Plain guidance beside AdaptiveGuidance: a contact sheet and what it cost."""
    from diffalign.cli.compare import finish
    from diffalign.cli.options import Options
    from diffalign.cli.request import Column, prepare
    from diffalign.core.registry import parse

    options = Options(
        model="emoji",
        prompts=prompts_of(nth),
        steps=STEPS,
        seed=seed,
        batch=len(prompts_of(nth)),
        output=output,
    )
    request = prepare(
        options, (Column(""), Column("adaptive-guidance", parse("adaptive-guidance")))
    )
    finish(request, quiet, json, title="GenEval prompts on the embedded model")


def main() -> None:
    """Run the demo as a program."""
    from diffalign.cli import main as program

    program(typer_app())


def typer_app() -> typer.Typer:
    """The demo as a command of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(demo)
    return app


if __name__ == "__main__":
    main()
