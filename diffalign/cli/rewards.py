"""``diffalign rewards``: what can be given to ``--reward``."""

import inspect
from os import PathLike
from typing import Annotated, Literal, get_origin

import typer

from diffalign.cli import show
from diffalign.cli.arguments import Json
from diffalign.cli.problem import BadInput, command
from diffalign.cli.techniques import paper_of, plain


@command
def rewards(
    name: Annotated[str | None, typer.Argument(help="One reward, with its documentation.")] = None,
    json: Json = False,
) -> None:
    """The rewards: size, memory, licence, gradient, and what each is best at."""
    from diffalign.core.errors import nearest
    from diffalign.rewards import available
    from diffalign.rewards.base import REWARDS, options_of_reward

    known = {info.name: info for info in available()}
    if name is not None and name not in known:
        raise BadInput(f"unknown reward {name!r}. Nearest: {nearest(name, known)}.")
    entries = [
        {
            "name": info.name,
            "what": info.description,
            "gradient": info.differentiable,
            "size": info.facts.size,
            "memory": info.facts.memory,
            "licence": info.facts.licence,
            "best": info.facts.best,
            "source": info.facts.source,
        }
        for key, info in known.items()
        if name in (None, key)
    ]
    if json:
        show.text(show.to_json(entries))
    elif name is not None:
        make = REWARDS.get(name)
        show.text(f"{name}: {plain(inspect.getdoc(make) or '')}\n")
        facts = [(key, value) for key, value in entries[0].items() if key not in ("name", "what")]
        paper = paper_of(make) if isinstance(make, type) else ""
        show.table(["fact", "value"], [*facts, ("paper", paper)])
        options = options_of_reward(make)
        if options:
            show.text("")
            rows = [(key.replace("_", "-"), readable(hint)) for key, hint in options.items()]
            show.table(["option", "type"], rows)
    else:
        show.table(
            ["reward", "gradient", "size", "memory", "licence", "best at"],
            [
                (
                    e["name"],
                    "yes" if e["gradient"] else "no",
                    *(e[key] for key in ("size", "memory", "licence", "best")),
                )
                for e in entries
            ],
            "memory: weights in 16 bits, and for one image with gradient; numbers: rank "
            "correlation with people",
        )


def readable(hint: object) -> str:
    """The type of an option as people read it; "an object" is for Python only."""
    from diffalign.core.values import alternatives, type_text

    texts = []
    for kind in alternatives(hint):
        plain_kind = kind in (str, int, float, bool, type(None)) or get_origin(kind) is Literal
        path = get_origin(kind) is PathLike
        texts.append("text" if path else type_text(kind) if plain_kind else "an object")
    return " or ".join(dict.fromkeys(texts))
