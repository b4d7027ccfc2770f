"""What a command prints: tables on standard output, progress on standard error and only on a
terminal, JSON without anything else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

PIPED_WIDTH = 160
Labelled = Callable[[str], Callable[[], None] | None]
"""From a label to what counts one step, None when there is nobody to see it."""


def finite(value: Any) -> Any:
    """``value`` with infinities and NaN as None, which JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: object) -> str:
    """Indented JSON; what is not JSON (a technique's own type) becomes text."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, default=str)


def text(line: object) -> None:
    """One line, or several, as they are."""
    typer.echo(str(line))


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str = "",
    numbers: Sequence[str] = (),
) -> None:
    """A table; the columns named in ``numbers`` are right-aligned. Cells are text, never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    grid = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    for head in heads:
        grid.add_column(Text(head), justify="right" if head in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console.print(grid)


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Labelled]:
    """A bar of ``total`` steps on standard error, only on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda label: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def labelled(label: str) -> Callable[[], None]:
            bar.update(task, description=label.replace("[", r"\["))
            return lambda: bar.advance(task)

        yield labelled
