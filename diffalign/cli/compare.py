"""``diffalign compare``: techniques side by side on the same noise."""

from pathlib import Path

from diffalign.cli import arguments, show
from diffalign.cli.problem import command
from diffalign.cli.request import check_free, prepare, techniques_of


@command
@arguments.shared(output=Path("outputs/compare"))
def compare(options: arguments.Options) -> None:
    """The plain pipeline beside each --technique, on the same noise: compare.png, compare.json,
    images/."""
    run(options)


def run(options: arguments.Options, title: str = "") -> None:
    """Compare, write sheet and data, and print the table or the data."""
    variants = [(text, techniques_of([text])) for text in options.technique or []]
    picture, beside = options.output / "compare.png", options.output / "compare.json"
    check_free(picture, beside, folder=options.output / "images")
    request = prepare(options, *(techniques for _, techniques in variants))
    from diffalign.cli import comparison
    from diffalign.drawing.png import save_png

    scale = request.model.scale
    plain = f"CFG {scale:g}" if scale != 1.0 else "plain"
    columns, why = comparison.compare(request, [(plain, ()), *variants], options.quiet)
    data = comparison.data(request, columns, why)
    data["sheet"] = str(picture)
    summary = {key: value for key, value in data.items() if key not in ("columns", "images")}
    settings = [{"label": c["label"], "techniques": c["techniques"]} for c in data["columns"]]
    save_png(
        comparison.sheet(request, columns, title),
        picture,
        show.finite({**summary, "prompts": request.prompts, "columns": settings}),
    )
    beside.write_text(show.to_json(data) + "\n", encoding="utf-8")
    if options.json:
        show.text(show.to_json(data))
    elif not options.quiet:
        comparison.print_table(request, columns)
        if why:
            show.text(why)
        show.text(picture)
        show.text(beside)
