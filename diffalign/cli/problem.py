"""How a command ends: exit code 0, 2 with one line for bad input, 130 after Ctrl-C, 1 with a
traceback for everything unexpected."""

import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

import typer

from diffalign.core.errors import BudgetExceeded

P = ParamSpec("P")


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one line and says what to do."""


def one_line(text: object) -> str:
    """``text`` with every run of white space as one blank."""
    return " ".join(str(text).split())


def complain(text: object, kind: str = "error") -> None:
    """One line on standard error."""
    typer.echo(f"diffalign: {kind}: {one_line(text)}", err=True)


@contextmanager
def checking() -> Iterator[None]:
    """Inside, a ValueError or TypeError is the user's: it becomes ``BadInput``.

    An option of the library is named as the command line writes it.
    """
    from diffalign.generate.errors import BadOption

    try:
        yield
    except BadOption as error:
        option = error.option.replace("_", "-")
        raise BadInput(one_line(f"--{option}: {error.reason}")) from error
    except (ValueError, TypeError) as error:
        raise BadInput(one_line(error)) from error


def _refused(error: ValueError) -> bool:
    """Whether the library or the pipeline's own ``check_inputs`` refused the call, before it
    computed anything."""
    from diffalign.core import UnsupportedModel

    return isinstance(error, UnsupportedModel) or any(
        f.name == "check_inputs" for f in traceback.extract_tb(error.__traceback__)
    )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *rest: object, **more: object
) -> None:
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(
        Path(__file__).parents[1]
    ):
        complain(message, "warning")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose failures end it with the exit codes of this module; our own warnings become
    one line each."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                function(*args, **kwargs)
        except BadInput as error:
            complain(error)
            raise typer.Exit(2) from error
        except BudgetExceeded as error:
            complain(f"{error} Give a larger --budget.")
            raise typer.Exit(2) from error
        except ValueError as error:
            if not _refused(error):
                raise
            complain(error)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            complain(error.args[0] if error.args else "interrupted", "stopped")
            raise typer.Exit(130) from error

    return run
