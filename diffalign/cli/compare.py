"""``diffalign compare``: techniques side by side on the same noise."""

from pathlib import Path

from . import arguments as a
from . import show
from .generate import techniques_of
from .problem import command


@command
def compare(
    prompt: a.Prompt = None,
    model: a.Model = "emoji",
    technique: a.Technique = None,
    prompts_file: a.PromptsFile = None,
    negative_prompt: a.Negative = None,
    steps: a.Steps = None,
    scale: a.Scale = None,
    seed: a.Seed = 0,
    count: a.Count = 1,
    batch: a.Batch = 4,
    size: a.Size = None,
    scheduler: a.Scheduler = None,
    dtype: a.Dtype = None,
    device: a.Device = "auto",
    output: a.Output = Path("outputs/compare"),
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """The plain pipeline beside each --technique, on the same noise: compare.png, compare.json, images/."""
    variants = [(text, techniques_of([text])) for text in technique or []]
    from .options import Options
    from .request import Column, prepare

    options = Options(
        model=model,
        prompts=tuple(prompt or ()),
        prompts_file=prompts_file,
        negative_prompt=negative_prompt,
        steps=steps,
        scale=scale,
        seed=seed,
        count=count,
        batch=batch,
        size=size,
        scheduler=scheduler,
        dtype=dtype,
        device=device,
        output=output,
    )
    request = prepare(options, (Column(""), *(Column(text, made) for text, made in variants)))
    finish(request, quiet, json)


def finish(request: object, quiet: bool, json: bool, title: str = "") -> None:
    """Run a prepared request, write sheet and data, print the table or the data."""
    from diffalign.eval.png import save_png

    from . import comparison
    from .request import Request

    assert isinstance(request, Request)
    results, why = comparison.compare(request, quiet)
    data = comparison.data(request, results, why)
    picture, beside = request.output / "compare.png", request.output / "compare.json"
    data["sheet"] = str(picture)
    summary = {key: value for key, value in data.items() if key not in ("columns", "images")}
    techniques = [{"label": c["label"], "techniques": c["techniques"]} for c in data["columns"]]
    save_png(
        comparison.sheet(request, results, title), picture, show.finite({**summary, "prompts": request.prompts, "columns": techniques})
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
