"""``diffalign check``: does everything work with a model on this machine?"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, command
from diffalign.cli.request import check_free, check_numbers, model_of, techniques_of, writable
from diffalign.core.types import Json

if TYPE_CHECKING:
    from diffalign.cli.examination import Examination

HEADS = ("what", "result", "NFE", "seconds", "beside plain", "peak MiB", "remark")


@command
@arguments.shared(
    without=("prompt", "prompts_file", "negative_prompt", "count", "seed", "batch"),
    help={
        "technique": "Tried besides all others: name:key=value+name2, repeatable.",
        "steps": "Sampling steps; as many as fit into --seconds if left out.",
        "output": "Folder of check.json; a file of that name is replaced.",
    },
    output=Path("outputs/check"),
)
def check(
    options: arguments.Options,
    seconds: Annotated[float, typer.Option(help="Begin nothing new after so many seconds.")] = 110,
) -> None:
    """Run every technique on a model of yours: a table, and check.json for a bug report.

    Switched off and at plain guidance not one bit may differ; evaluations are counted inside the
    model; time and memory stand beside the plain pipeline. Exit code 1 when anything failed.
    """
    check_numbers(options)
    if not 0 < seconds < math.inf:
        raise BadInput(f"--seconds must be a finite number above 0; got {seconds}.")
    path = writable(options.output) / "check.json"
    check_free(path)
    further = [(text, techniques_of([text])) for text in options.technique or []]
    model = model_of(options, *(group for _, group in further))
    from diffalign.cli.examination import Examination

    examination = Examination(model, seconds, options.steps, further)
    finished = False
    try:
        with show.progress(examination.count, options.quiet) as bar:
            for name in examination.examine():
                if (advance := bar(name)) is not None:
                    advance()
        finished = True
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was found until then is in {path}") from None
    finally:
        data = facts(examination, finished)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(show.to_json(data) + "\n", encoding="utf-8")
    if options.json:
        show.text(show.to_json(data))
    elif not options.quiet:
        print_table(data)
        show.text(path)
    if data["failed"]:
        raise typer.Exit(1)


def facts(examination: Examination, finished: bool) -> Json:
    """Everything as data, without paths of the machine but the model as it was named."""
    from diffalign.cli.env import facts as environment

    model, results = examination.model, [f.result for f in examination.findings]
    machine = environment()
    del machine["executable"]
    return {
        "model": model.name,
        "pipeline": type(model.pipe).__name__,
        "scheduler": model.scheduler,
        "dtype": str(model.pipe.dtype).removeprefix("torch."),
        "device": str(model.pipe.device),
        "steps": examination.steps,
        "scale": model.scale,
        "size": model.size,
        "seconds": perf_counter() - examination.began,
        "finished": finished,
        **{result: results.count(result) for result in ("ok", "failed", "refused", "skipped")},
        "findings": [asdict(finding) for finding in examination.findings],
        "environment": machine,
    }


def print_table(data: Json) -> None:
    """The findings, and how many of each result."""
    rows = [cells(finding) for finding in data["findings"]]
    title = (
        f"{data['model']}: {data['pipeline']}, {data['scheduler']}, {data['steps']} steps, "
        f"{data['dtype']} on {data['device']}; one image, not decoded"
    )
    show.table(HEADS, rows, title, numbers=HEADS[2:6])
    counts = ", ".join(f"{data[result]} {result}" for result in ("ok", "failed", "refused"))
    show.text(f"{counts}, {data['skipped']} skipped in {data['seconds']:.0f} s")


def cells(finding: Json) -> list[str]:
    """One line of the table; a dash for what was not measured."""
    seconds, plain, peak = (finding[key] for key in ("seconds", "plain_seconds", "peak_bytes"))
    return [
        finding["name"],
        finding["result"],
        "-" if finding["nfe"] is None else f"{finding['nfe']:g}",
        "-" if seconds is None else f"{seconds:.2f}",
        "-" if not seconds or not plain else f"x {seconds / plain:.2f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        finding["remark"],
    ]
