"""``diffalign models``: what ``--model`` takes."""

from typing import Annotated

import typer

from diffalign.cli import show
from diffalign.cli.arguments import Json
from diffalign.cli.problem import checking, command


@command
def models(
    pipeline: Annotated[
        str | None,
        typer.Argument(help="A diffusers pipeline class: is it supported, and if not, why?"),
    ] = None,
    json: Json = False,
) -> None:
    """Embedded models, and the diffusers pipelines that techniques work on."""
    if pipeline is None:
        list_models(json)
    else:
        describe(pipeline, json)


def describe(pipeline: str, json: bool) -> None:
    """One pipeline class, or the reason against it."""
    from diffalign.families import family_of

    with checking():
        family = family_of(type(pipeline, (), {}))
    facts: dict[str, object] = {
        "pipeline": pipeline,
        "family": family.name,
        "denoisers": family.denoisers,
        "scale": family.gates,
    }
    if json:
        show.text(show.to_json(facts))
        return
    scale = (
        f"guidance scale {', '.join(family.gates)}"
        if family.gates
        else "no guidance scale to set (distilled into the model)"
    )
    show.text(f"{pipeline} is supported: family {family.name}, {scale}.")


def list_models(json: bool) -> None:
    """Embedded models and supported pipelines."""
    from diffalign.embedded import available
    from diffalign.families import FAMILIES, refusals

    families: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        families.setdefault(family.name, []).append(name)
    if json:
        embedded = [
            {"name": m.name, "description": m.description, "bytes": m.bytes} for m in available()
        ]
        facts = {"embedded": embedded, "families": families, "refused": len(refusals())}
        show.text(show.to_json(facts))
        return
    if available():
        rows = [(m.name, f"{m.bytes / 1e6:.1f} MB", m.description) for m in available()]
        show.table(["name", "size", "what"], rows, "Embedded models (offline)", numbers=["size"])
    else:
        show.text("No embedded model is installed.")
    show.text("")
    show.table(
        ["family", "pipelines"],
        [(family, ", ".join(names)) for family, names in families.items()],
        "Pipelines from folders or the hub",
    )
    show.text(
        f"{len(refusals())} other pipeline classes are refused, each with its reason: diffalign "
        "models CLASS"
    )
