"""``diffalign methods``: what can be given to ``align --method``."""

import inspect
from typing import Annotated

import typer

from diffalign.cli import show
from diffalign.cli.arguments import Json
from diffalign.cli.problem import BadInput, command
from diffalign.cli.techniques import defaults_of, option_rows, paper_of, plain


@command
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its documentation.")] = None,
    json: Json = False,
) -> None:
    """The methods of align: paper, options with types and defaults, cost."""
    from diffalign.core import registry
    from diffalign.core.errors import nearest
    from diffalign.seams.support import cost_of

    known = registry.methods()
    if name is not None and name not in known:
        raise BadInput(f"unknown method {name!r}. Nearest: {nearest(name, known)}.")
    entries = [
        {
            "name": key,
            "class": cls.__name__,
            "what": plain(" ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())),
            "paper": paper_of(cls),
            "cost": plain(cost_of(cls)),
            "options": option_rows(cls),
        }
        for key, cls in known.items()
        if name in (None, key)
    ]
    if json:
        show.text(show.to_json(entries))
    elif name is not None:
        show.text(f"{name}: {plain(inspect.getdoc(known[name]) or '')}\n")
        heads = ["option", "type", "default", "range", "meaning"]
        rows = [list(option.values()) for option in option_rows(known[name])]
        show.table(heads, rows)
    else:
        show.table(
            ["method", "options", "cost", "paper"],
            [
                (e["name"], defaults_of(option_rows(known[str(e["name"])])), e["cost"], e["paper"])
                for e in entries
            ],
        )
