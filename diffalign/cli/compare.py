"""``diffalign compare``: techniques side by side on the same noise."""

from pathlib import Path

from diffalign.cli import arguments as a
from diffalign.cli import show
from diffalign.cli.generate import techniques_of
from diffalign.cli.options import Options, free
from diffalign.cli.problem import command


@command
@a.shared(output=Path("outputs/compare"))
def compare(
    options: Options,
    technique: a.Technique = None,
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """The plain pipeline beside each --technique, on the same noise: compare.png, compare.json,
    images/."""
    variants = [(text, techniques_of([text])) for text in technique or []]
    from diffalign.cli.request import Column, prepare

    free(
        options.output / "compare.png",
        options.output / "compare.json",
        folder=options.output / "images",
    )
    request = prepare(options, (Column(""), *(Column(text, made) for text, made in variants)))
    finish(request, quiet, json)


def finish(request: object, quiet: bool, json: bool, title: str = "") -> None:
    """Run a prepared request, write sheet and data, print the table or the data."""
    from diffalign.cli import comparison
    from diffalign.cli.request import Request
    from diffalign.drawing.png import save_png

    assert isinstance(request, Request)
    results, why = comparison.compare(request, quiet)
    data = comparison.data(request, results, why)
    picture, beside = request.output / "compare.png", request.output / "compare.json"
    data["sheet"] = str(picture)
    summary = {key: value for key, value in data.items() if key not in ("columns", "images")}
    techniques = [{"label": c["label"], "techniques": c["techniques"]} for c in data["columns"]]
    save_png(
        comparison.sheet(request, results, title),
        picture,
        show.finite({**summary, "prompts": request.prompts, "columns": techniques}),
    )
    beside.write_text(show.to_json(data) + "\n", encoding="utf-8")
    if json:
        show.text(show.to_json(data))
    elif not quiet:
        comparison.print_table(request, results)
        if why:
            show.text(why)
        show.text(picture)
        show.text(beside)
