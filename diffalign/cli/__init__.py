"""The command line, ``diffalign --help``, one file per command.

Help is shown without loading a model library: commands import what they need when they run.

Exit codes: 0 done, 2 bad input (one line on standard error, before anything is computed), 130 after
Ctrl-C, 1 a run of ``eval`` that had to stop (one line), a ``check`` that found something wrong, or
anything unexpected.
"""

import logging
import os
import sys
from typing import Annotated

import typer

from diffalign.cli.align import align
from diffalign.cli.calibrate import calibrate
from diffalign.cli.check import check
from diffalign.cli.compare import compare
from diffalign.cli.demo import demo
from diffalign.cli.env import env
from diffalign.cli.evaluate import evaluate
from diffalign.cli.fit import fit
from diffalign.cli.generate import generate
from diffalign.cli.methods import methods
from diffalign.cli.models import models
from diffalign.cli.page import app as page
from diffalign.cli.problem import complain
from diffalign.cli.rewards import rewards
from diffalign.cli.techniques import techniques

__all__ = ["app", "main"]

# diffusers imports torchao where it is installed, and both talk about it on standard error
for _name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (
    *(demo, generate, compare, align, check, page),
    *(models, techniques, methods, rewards, env),
):
    app.command()(function)
app.add_typer(evaluate, name="eval")
app.add_typer(fit, name="fit")
app.add_typer(calibrate, name="calibrate")


def _version(value: bool) -> None:
    if value:
        from diffalign import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Inference-time alignment and guidance for diffusers pipelines."""


def main(program: typer.Typer = app) -> None:
    """Run the command line and exit. Wrong usage is one line too, as every other bad input."""
    try:
        code = program(standalone_mode=False)
    except typer.Abort:
        complain("interrupted", "stopped")
        code = 130
    # the reader (head, less) has left: nothing more to say, and Python must not complain at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's usage errors
        if message is None:
            raise
        if text := message():  # empty where help was shown for want of a command
            complain(f"{text} Try --help.")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
