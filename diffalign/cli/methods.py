"""``diffalign techniques``: what can be given to ``--technique``."""

import dataclasses
import inspect
import re
import typing
from typing import Annotated, Any

import typer

from diffalign.cli import show
from diffalign.cli.problem import BadInput, checking, command

_NAME = r"[^\W\d_][\w-]*(?:,| and| et al\.)? "
_PAPER = re.compile(rf"((?![a-z])(?:{_NAME})+\d{{4}}), (arXiv:\d{{4}}\.\d{{4,5}})")


def paper_of(cls: type) -> str:
    """The first paper that the class or its module names, as "Authors year, arXiv:id"; empty for
    none."""
    texts = [
        " ".join((inspect.getdoc(source) or "").split()) for source in (cls, inspect.getmodule(cls))
    ]
    found = next((match for text in texts if (match := _PAPER.search(text))), None)
    return f"{found[1]}, {found[2]}" if found else ""


def type_text(hint: Any) -> str:
    """An annotation as the command line reads it: "number or none", "eps | x0", "(number, number)"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else type_text(a) for a in args)})"
    if args:
        return " or ".join(type_text(a) for a in args)
    names = {float: "number", int: "integer", str: "text", bool: "true | false", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_text(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return f"({','.join(map(default_text, value))})"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def options_of(cls: type) -> list[dict[str, str]]:
    """Options of a technique: name, type and default as text; "required" where there is no default."""
    hints, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if field.init:
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            text = "required" if default is dataclasses.MISSING else default_text(default)
            found.append(
                {
                    "name": field.name.replace("_", "-"),
                    "type": type_text(hints[field.name]),
                    "default": text,
                }
            )
    return found


def describe(name: str, cls: type) -> dict[str, Any]:
    """One technique as data."""
    from diffalign.seams.supports import cost_of

    what = (inspect.getdoc(cls) or "").split("\n\n")[0]
    base = {
        "name": name,
        "class": cls.__name__,
        "kind": getattr(cls, "kind", ""),
        "what": " ".join(what.split()),
    }
    return {
        **base,
        "paper": paper_of(cls),
        "cost": cost_of(cls).replace("``", ""),
        "options": options_of(cls),
    }


@command
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One technique, with its documentation.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Say which work on this model, and why not.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """The techniques: paper, options with types and defaults, cost."""
    from diffalign.core.errors import nearest
    from diffalign.core.registry import techniques as registered

    known = registered()
    if name is not None and name not in known:
        raise BadInput(f"unknown technique {name!r}. Nearest: {nearest(name, known)}.")
    chosen = known if name is None else {name: known[name]}
    found = [describe(key, cls) for key, cls in chosen.items()]
    if model is not None:
        from diffalign import supports
        from diffalign.generate.models import find, load

        with checking():
            table = {s.name: s for s in supports(load(find(model), "float32", "cpu"))}
        for entry in found:
            entry |= {"works": table[entry["name"]].works, "reason": table[entry["name"]].reason}
    if json:
        show.text(show.to_json(found))
    elif model is not None:
        answers = [
            (e["name"], "yes" if e["works"] else "no", e["cost"] if e["works"] else e["reason"])
            for e in found
        ]
        show.table(["technique", "works", f"cost, or why not, on {model}"], answers)
    elif name is not None:
        show.text(f"{name}: {inspect.getdoc(known[name])}\n")
        show.table(
            ["option", "type", "default"],
            [(o["name"], o["type"], o["default"]) for o in found[0]["options"]],
        )
    else:
        rows = [
            (
                e["name"],
                "\n".join(f"{o['name']}={o['default']}" for o in e["options"]),
                e["cost"],
                e["paper"],
            )
            for e in found
        ]
        show.table(
            ["technique", "options", "cost", "paper"],
            rows,
            "none: taken from the pipeline or looked up for the model",
        )
