"""The files of a report: numbers, one line per image, tables and a page.

results.json      all numbers
samples.jsonl     one line for each image
results.parquet   the same as a table, where pyarrow is installed
results.md        a table to be read
timing.json       seconds, hosts and dates: the only numbers that change from run to run
index.html        everything in one page that needs no network
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from diffalign.core.types import Json
from diffalign.eval.benchmarks import order_of
from diffalign.eval.files import storage, write, write_json
from diffalign.eval.page import page
from diffalign.eval.results import Column
from diffalign.eval.summary import FEW, published_lines, summarise, timing_of


def report(table: Sequence[Column], folder: Path) -> tuple[Json, list[Path]]:
    """Write the files of a report into ``folder``; its numbers and the files.

    Raises: ``RunError`` for runs that cannot be compared, and when the disk fails.
    """
    numbers, timing = summarise(table), timing_of(table)
    lines = [line for column in table for line in lines_of(column)]
    contents: dict[str, bytes | str] = {
        "samples.jsonl": "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines),
        "results.md": markdown(numbers),
        "index.html": page(table, numbers, timing),
    }
    parquet = parquet_of(lines)
    if parquet is not None:
        contents["results.parquet"] = parquet
    with storage(folder):
        write_json(folder / "results.json", numbers)
        write_json(folder / "timing.json", timing)
        for name, content in contents.items():
            write(folder / name, content)
    names = ["results.json", *contents, "timing.json"]
    return numbers, [folder / name for name in names]


def lines_of(column: Column) -> list[Json]:
    """The images of a run as flat rows."""
    return [
        {
            "run": column.label,
            "prompt_id": shot.index,
            "sample": shot.sample,
            "tag": shot.tag,
            "prompt": shot.prompt,
            "file": shot.file,
            "seed": shot.seed,
            "score": shot.score,
            "reason": shot.reason,
            "nfe": shot.cost.get("nfe"),
        }
        for shot in column.shots
    ]


def parquet_of(lines: Sequence[Json]) -> bytes | None:
    """The rows as a Parquet file, None where pyarrow is not installed."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        return None
    buffer = BytesIO()
    parquet.write_table(arrow.Table.from_pylist(list(lines)), buffer)
    return buffer.getvalue()


def markdown(numbers: Json) -> str:
    """The numbers as a table: a row for each run, a column for each category."""
    results: dict[str, Json] = numbers["results"]
    tags = order_of([tag for result in results.values() for tag in result["tags"]])
    heads = ["run", *tags, "mean of categories", "overall", "best of images", "NFE"]
    rows = [heads, ["---"] * len(heads)]
    for label, result in results.items():
        cells = [spread_text(result["tags"].get(tag)) for tag in tags]
        overall = "-" if result["overall"] is None else f"**{result['overall']:.3f}**"
        best, nfe = f"{result['best_of_images']:.3f}", number_text(result["nfe"])
        rows.append([label, *cells, spread_text(result["mean_of_tags"]), overall, best, nfe])
    text = [f"# {numbers['benchmark']}, judged by {numbers['scorer']['name']}", ""]
    text += [f"| {' | '.join(cell_text(cell) for cell in row)} |" for row in rows]
    text += ["", "Intervals: 95%, bootstrap over prompts within their categories."]
    for label, result in results.items():
        if result["incomplete"]:
            text.append(f"No overall of {cell_text(label)}: {cell_text(result['incomplete'])}.")
        text += [f"Warning, {cell_text(label)}: {cell_text(w)}" for w in result["warnings"]]
        if "geometric" in result:
            text.append(
                f"Geometric mean of the answers, {cell_text(label)}: {result['geometric']:.3f}."
            )
    text += map(cell_text, published_lines(results))
    if numbers["comparisons"]:
        text += ["", *comparison_lines(numbers["comparisons"])]
    return "\n".join(text) + "\n"


def comparison_lines(entries: Sequence[Json]) -> list[str]:
    """A table of the paired comparisons."""
    heads = ["paired, by prompt", "difference", "p (Holm)", "won", "tied", "lost"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for entry in entries:
        name = cell_text(f"{entry['b']} - {entry['a']}")
        counts = " | ".join(str(entry[key]) for key in ("won", "tied", "lost"))
        lines.append(f"| {name} | {difference_text(entry)} | {entry['p_holm']:.4f} | {counts} |")
    return lines


def cell_text(text: str) -> str:
    """``text`` as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def spread_text(value: Json | None) -> str:
    """Mean and half of its interval, which few prompts do not have."""
    if value is None:
        return "-"
    if value["prompts"] < FEW:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ± {(value['high'] - value['low']) / 2:.3f}"


def difference_text(value: Json) -> str:
    """Difference and interval."""
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def number_text(value: float | None) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.4g}"
