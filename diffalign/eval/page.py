"""The page of a report: one file without scripts from elsewhere, which opens without a network.

Every text is escaped, and the page's own policy lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING

from diffalign.core.types import Json
from diffalign.drawing.bars import Point, Series, bar_chart, cost_chart
from diffalign.eval.benchmarks import order_of
from diffalign.eval.results import Column, Shot
from diffalign.eval.summary import FEW, published_lines

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 10_000_000
"""Bytes that the pictures of a page may take; they are shrunk until they fit."""
TILE = 96
"""Side of an image as it is shown, in pixels."""
SIZES = ((96, 80), (80, 75), (64, 70), (48, 60), (32, 50), (24, 30))
"""Side in pixels and WebP quality of the images as they are stored; the first that fits counts."""


def page(table: Sequence[Column], numbers: Json, timing: Json) -> str:
    """The whole page as text."""
    style, script = _asset("page.css"), _asset("page.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'"
    )
    title = f"{numbers['benchmark']}, judged by {numbers['scorer']['name']}"
    body = [
        f"<h1>{_text(title)}</h1>",
        "".join(_warning(label, r) for label, r in numbers["results"].items()),
        _charts(table, numbers, timing),
        "<h2>Scores</h2>",
        _scores(numbers, timing),
        "".join(f"<p>{_text(line)}</p>" for line in published_lines(numbers["results"])),
        _comparisons(numbers["comparisons"]),
        "<h2>Images</h2>",
        _filters(table),
        _browser(table),
        "<h2>Settings</h2>",
        _settings(table, numbers, timing),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body>"
        f"{''.join(body)}\n<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("diffalign.eval") / name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _picture(data: bytes, kind: str, text: str, size: str = "") -> str:
    code = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{code}" alt="{_text(text)}"{size}>'


def _rows(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table of texts; the first column names the row."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{_text(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _warning(label: str, result: Json) -> str:
    texts = [f"{label}: {text}" for text in result["warnings"]]
    if result["incomplete"]:
        texts.append(f"{label}: no overall; {result['incomplete']}.")
    if result["unscored"]:
        texts.append(f"{label}: {result['unscored']} prompts have images and no score.")
    return "".join(f'<p class="warning">{_text(text)}</p>' for text in texts)


def _charts(table: Sequence[Column], numbers: Json, timing: Json) -> str:
    """Bars of the categories, and score against NFE and seconds."""
    results: dict[str, Json] = numbers["results"]
    tags = order_of([tag for result in results.values() for tag in result["tags"]])
    series = []
    for label, result in results.items():
        entries = [
            result["tags"].get(tag, dict.fromkeys(("mean", "low", "high"), 0)) for tag in tags
        ]
        entries.append(result["mean_of_tags"])
        values = ([entry[key] for entry in entries] for key in ("mean", "low", "high"))
        series.append(Series(label, *values))
    chart = bar_chart([*tags, "mean"], series, "Score by category, with 95% intervals")
    pictures = [_picture(chart, "png", "bars of the score by category")]
    for unit, costs in (
        ("NFE", {label: result["nfe"] for label, result in results.items()}),
        ("seconds", {label: timing[label]["seconds_median"] for label in results}),
    ):
        points = [
            Point(label, costs[label], *(results[label]["mean_of_tags"][k] for k in _INTERVAL))
            for label in results
            if costs[label] is not None
        ]
        if points:
            pictures.append(_picture(cost_chart(points, unit), "png", f"score against {unit}"))
    return f'<div class="charts">{"".join(pictures)}</div>'


_INTERVAL = ("mean", "low", "high")


def _scores(numbers: Json, timing: Json) -> str:
    results: dict[str, Json] = numbers["results"]
    tags = order_of([tag for result in results.values() for tag in result["tags"]])
    heads = ["run", *tags, "mean of categories", "overall", "best of images", "prompts", "images"]
    heads += ["size", "NFE", "rewards", "tied", "seconds, median", "seconds, 90%"]
    rows = []
    for label, result in results.items():
        entries = [*(result["tags"].get(tag) for tag in tags), result["mean_of_tags"]]
        cells = [_spread(e) for e in entries]
        cells += [_number(result["overall"]), _number(result["best_of_images"])]
        cells += [result["mean_of_tags"]["prompts"], result["images"]]
        cells.append(", ".join(result["sizes"]) or "-")
        cells += [_number(result[name]) for name in ("nfe", "rewards", "tied")]
        times = timing[label]
        cells += [_number(times["seconds_median"]), _number(times["seconds_p90"])]
        rows.append([label, *cells])
    return _rows(heads, rows)


def _spread(entry: Json | None) -> str:
    """Mean and half of the interval; an interval over few prompts says nothing."""
    if entry is None:
        return "-"
    half = f" ± {(entry['high'] - entry['low']) / 2:.3f}" if entry["prompts"] >= FEW else ""
    return f"{entry['mean']:.3f}{half}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _comparisons(entries: Sequence[Json]) -> str:
    if not entries:
        return ""
    heads = ["difference", "mean", "95%", "p, Holm", "prompts won", "tied", "lost"]
    heads += ["images: both", "only the first", "only the second", "neither", "McNemar p"]
    rows = []
    for e in entries:
        span = f"{e['low']:+.3f} to {e['high']:+.3f}"
        row = [f"{e['b']} minus {e['a']}", f"{e['mean']:+.3f}", span, f"{e['p_holm']:.4f}"]
        row += [e["won"], e["tied"], e["lost"]]
        images = e.get("images", {})
        row += [images.get(k, "-") for k in ("both", "only_b", "only_a", "neither")]
        rows.append([*row, _number(e.get("mcnemar"))])
    return f"<h2>Paired comparisons</h2>{_rows(heads, rows)}"


def _filters(table: Sequence[Column]) -> str:
    """What the failure browser is filtered by."""

    def choice(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
        values = "".join(f'<option value="{_text(v)}">{_text(t)}</option>' for v, t in options)
        return f'<label>{label} <select id="{name}">{values}</select></label>'

    tags = order_of([shot.tag for column in table for shot in column.shots])
    runs = [(str(number), column.label) for number, column in enumerate(table)]
    verdicts = [("", "all"), ("some", "some wrong"), ("none", "all wrong"), ("full", "all right")]
    if len(table) > 1:
        verdicts += [("differ", "runs differ")]
    return (
        '<p class="filters">'
        + choice("tag", "category", [("", "all"), *((tag, tag) for tag in tags)])
        + choice("verdict", "verdict", verdicts)
        + choice("run", "of run", runs)
        + '<label>prompt <input id="words" type="search"></label> <span id="count"></span></p>'
    )


def _browser(table: Sequence[Column]) -> str:
    """A card for each prompt, with a strip of its images for each run."""
    units = [column.units for column in table]
    side, quality = _size(table)
    cards = []
    for index in sorted(set().union(*units)):
        strips, means = [], []
        for column, group in zip(table, units):
            shots = group.get(index, [])
            means.append(f"{sum(s.score for s in shots) / len(shots):.4f}" if shots else "")
            if shots:
                strips.append(_strip(column.label, shots, side, quality, len(table) > 1))
        first = next(group[index][0] for group in units if index in group)
        cards.append(
            f'<article data-tag="{_text(first.tag)}" data-scores="{_text(" ".join(means))}">'
            f"<h3>{_text(first.prompt)}</h3><small>{_text(first.tag)}, {index}</small>"
            f"{''.join(strips)}</article>"
        )
    return f'<main style="--side:{TILE}px">{"".join(cards)}</main>'


def _strip(label: str, shots: Sequence[Shot], side: int, quality: int, named: bool) -> str:
    """The images of a prompt side by side, each with its mark."""
    marks = []
    for shot in shots:
        kind = "right" if shot.score > 0.99 else "wrong" if shot.score < 0.5 else "partly"
        sign = {"right": "✓", "wrong": "✗", "partly": "~"}[kind]
        text = sign if shot.score in (0.0, 1.0) else f"{sign} {shot.score:.2f}"
        marks.append(f'<i class="{kind}" title="{_text(shot.reason)}">{text}</i>')
    reasons = dict.fromkeys(shot.reason for shot in shots if shot.reason)
    size = f' width="{TILE * len(shots)}" height="{TILE}"'
    return (
        f"{f'<b>{_text(label)}</b>' if named else ''}"
        f"{_picture(_webp(shots, side, quality), 'webp', shots[0].prompt, size)}"
        f'<div class="marks">{"".join(marks)}</div>'
        f"<p>{_text('; '.join(reasons))}</p>"
    )


def _webp(shots: Sequence[Shot], side: int, quality: int) -> bytes:
    """The images of a prompt in one picture of tiles; a grey tile where one is missing."""
    from PIL import Image

    images = [_opened(shot) for shot in shots]
    side = min(side, max(max(image.size) for image in images))
    strip = Image.new("RGB", (side * len(shots), side), "#999999")
    for number, image in enumerate(images):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        x, y = ((side - length) // 2 for length in image.size)
        strip.paste(image, (side * number + x, y))
    buffer = BytesIO()
    strip.save(buffer, format="WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _opened(shot: Shot) -> Image.Image:
    """The image of a shot, one grey pixel where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(shot.path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (1, 1), "#999999")


def _size(table: Sequence[Column]) -> tuple[int, int]:
    """The largest size at which all pictures fit, judged by thirty of them."""
    groups = [shots for column in table for shots in column.units.values()]
    some = [groups[i * len(groups) // 30] for i in range(30)] if len(groups) > 30 else groups
    for side, quality in SIZES:
        each = sum(len(_webp(shots, side, quality)) for shots in some) / len(some)
        if each * len(groups) * 4 / 3 <= LARGEST:
            return side, quality
    return SIZES[-1]


def _settings(table: Sequence[Column], numbers: Json, timing: Json) -> str:
    """Settings, scorer and environment in full."""

    def block(name: str, value: object) -> str:
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        return f"<details><summary>{_text(name)}</summary><pre>{_text(text)}</pre></details>"

    parts = [block("scorer", numbers["scorer"])]
    for column in table:
        parts.append(block(f"{column.label}: settings", column.settings))
        parts.append(block(f"{column.label}: where it ran", timing[column.label]["places"]))
    return "".join(parts)
