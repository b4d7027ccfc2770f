"""``diffalign models``: what ``--model`` takes."""

from typing import Annotated

import typer

from diffalign.cli import show
from diffalign.cli.problem import checking, command


@command
def models(
    pipeline: Annotated[
        str | None,
        typer.Argument(help="A diffusers pipeline class: is it supported, and if not, why?"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Embedded models, and the diffusers pipelines that techniques work on."""
    from diffalign.embedded import available
    from diffalign.families import FAMILIES, family_of, refusals

    if pipeline is not None:
        with checking():
            family = family_of(type(pipeline, (), {}))
        answer = {
            "pipeline": pipeline,
            "family": family.name,
            "denoisers": family.denoisers,
            "scale": family.gates,
        }
        if json:
            show.text(show.to_json(answer))
        else:
            scale = (
                f"guidance scale {', '.join(family.gates)}"
                if family.gates
                else "no guidance scale to set (distilled into the model)"
            )
            show.text(f"{pipeline} is supported: family {family.name}, {scale}.")
        return
    installed = [
        {"name": m.name, "description": m.description, "bytes": m.bytes} for m in available()
    ]
    families: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        families.setdefault(family.name, []).append(name)
    if json:
        show.text(
            show.to_json({"embedded": installed, "families": families, "refused": len(refusals())})
        )
        return
    if installed:
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
