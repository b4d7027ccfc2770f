"""``diffalign techniques``: what can be given to ``--technique``."""

import inspect
import re
from typing import Annotated, Any

import typer

from diffalign.cli import show
from diffalign.cli.arguments import Json
from diffalign.cli.problem import BadInput, checking, command
from diffalign.core.option import options_of

_NAME = r"[^\W\d_][\w-]*(?:,| and| et al\.)? "
_PAPER = re.compile(rf"((?![a-z])(?:{_NAME})+\d{{4}}), (arXiv:\d{{4}}\.\d{{4,5}})")


def paper_of(cls: type) -> str:
    """The first paper that the class or its module names, as "Authors year, arXiv:id"; empty for
    none."""
    texts = [
        " ".join((inspect.getdoc(source) or "").split()) for source in (cls, inspect.getmodule(cls))
    ]
    match = next((match for text in texts if (match := _PAPER.search(text))), None)
    return f"{match[1]}, {match[2]}" if match else ""


def option_rows(cls: type) -> list[dict[str, str]]:
    """Options of a technique as text: name, type, default ("required" for none), range, meaning."""
    return [
        {
            "name": name.replace("_", "-"),
            "type": spec.type_text,
            "default": spec.default_text,
            "range": spec.range,
            "meaning": spec.meaning,
        }
        for name, spec in options_of(cls).items()
    ]


def describe(name: str, cls: type) -> dict[str, Any]:
    """One technique as data; texts are without markup."""
    from diffalign.seams.support import cost_of

    what = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return {
        "name": name,
        "class": cls.__name__,
        "seam": getattr(cls, "seam", ""),
        "what": plain(" ".join(what.split())),
        "paper": paper_of(cls),
        "cost": plain(cost_of(cls)),
        "options": option_rows(cls),
    }


def plain(text: str) -> str:
    """Documentation without its markup."""
    return text.replace("``", "")


@command
def techniques(
    name: Annotated[
        str | None, typer.Argument(help="One technique, with its documentation.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Say which work on this model, and why not.")
    ] = None,
    json: Json = False,
) -> None:
    """The techniques: paper, options with types and defaults, cost."""
    from diffalign.core import registry
    from diffalign.core.errors import nearest

    known = registry.techniques()
    if name is not None and name not in known:
        raise BadInput(f"unknown technique {name!r}. Nearest: {nearest(name, known)}.")
    classes = known if name is None else {name: known[name]}
    entries = [describe(key, cls) for key, cls in classes.items()]
    if model is not None:
        add_support(entries, model)
    if json:
        show.text(show.to_json(entries))
    elif model is not None:
        answers = [
            (e["name"], "yes" if e["works"] else "no", e["cost"] if e["works"] else e["reason"])
            for e in entries
        ]
        show.table(["technique", "works", f"cost, or why not, on {model}"], answers)
    elif name is not None:
        show.text(f"{name}: {plain(inspect.getdoc(known[name]) or '')}\n")
        heads = ["option", "type", "default", "range", "meaning"]
        rows = [list(option.values()) for option in entries[0]["options"]]
        show.table(heads, rows)
    else:
        show.table(
            ["technique", "options", "cost", "paper"],
            [(e["name"], defaults_of(e["options"]), e["cost"], e["paper"]) for e in entries],
            "none: taken from the pipeline or looked up for the model",
        )


def defaults_of(options: list[dict[str, str]]) -> str:
    """One option and its default on each line."""
    return "\n".join(f"{option['name']}={option['default']}" for option in options)


def add_support(entries: list[dict[str, Any]], model: str) -> None:
    """Say of each technique whether it works on a model, and if not, why."""
    from diffalign.generate.models import Setting, open_model
    from diffalign.seams import supports

    with checking():
        pipe = open_model(model, Setting(dtype="fp32", device="cpu")).pipe
        table = {support.name: support for support in supports(pipe)}
    for entry in entries:
        entry["works"] = table[entry["name"]].works
        entry["reason"] = plain(table[entry["name"]].reason)
