"""One page for each technique: what it does, how to use it, options, picture, measured figures."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import advice
import readme
from results import FOLDER, Estimate, Result, Row, read
from showcase import FACTS, SHOWS, STEPS, Show

import diffalign as da
from diffalign.cli.techniques import describe

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_LABEL = re.compile(r"^(Cost|Raises|Refuses|Differs from [\w ]+):", flags=re.M)
CHARTS = {
    "guidance": ("guidance-scale.png", "Score against the effective scale of every rule"),
    "adaptive": ("adaptive.png", "Score against cost"),
    "dynamic": ("dynamic.png", "Weights that were chosen, by step"),
    "negation": ("negation-images.png", "The same noise under four ways to negate"),
    "pruning_quality": ("pruning-quality.png", "Quality against seconds"),
}
"""Result -> a chart of it, and what it shows."""


def index() -> str:
    """The page of all techniques, by room."""
    head = """# Techniques

A technique changes one run of your pipeline. Each is one line around the call:
`with da.apply(pipe, technique):`. For what to use when, see [Choosing a technique](../choosing.md).

Cost is beside plain guidance. Results are those of a small embedded model: first answers,
with everything that did not help in the same table. A score is the difference of the share of
correct images to plain guidance at its best scale, with a 95% interval.
"""
    rows = [[f"[`{name}`]({name}.md)", *readme.short(name)] for name in da.techniques()]
    heads = ["technique", "what it does for you", "cost", "measured"]
    return head + "\n" + readme.table(heads, rows)


def page(name: str) -> str:
    """The page of a technique."""
    cls = da.techniques()[name]
    facts = describe(name, cls)
    paragraphs = documentation(cls)
    parts = [
        f"# {cls.__name__}",
        f"*{readme.purpose(name)[:1].upper()}{readme.purpose(name)[1:]}.*",
        paragraphs[0],
        *use(name),
        *picture(name),
        "## Options",
        "`none` stands for a value that is taken from the call or looked up for the model; the "
        "report of a run says which it was and where it came from.",
        readme.table(
            ["option", "type", "default", "range", "meaning"],
            [[safe(text) for text in option.values()] for option in facts["options"]],
        ),
        "## Measured",
        *measured(name),
        "## In full",
        *paragraphs[1:],
    ]
    return "\n\n".join(parts) + "\n"


def documentation(cls: type) -> list[str]:
    """The paragraphs of a docstring as Markdown; each label begins one."""
    text = _LABEL.sub(r"\n\1:", inspect.getdoc(cls) or "")
    paragraphs = [safe(" ".join(part.split())) for part in re.split(r"\n\s*\n", text) if part]
    paragraphs = [_LABEL.sub(r"**\1:**", paragraph) for paragraph in paragraphs]
    return [_ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", p) for p in paragraphs]


def safe(text: str) -> str:
    """Text whose signs are none of HTML's or of a table's, where they are no code."""
    parts = re.split(r"(``?[^`]*``?)", text)
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "".join(parts).replace("|", "&#124;" if "`" not in text else "|")


def use(name: str) -> Iterator[str]:
    """The code of the picture, and the command line."""
    title = da.techniques()[name].__name__
    show, facts = SHOWS.get(name, Show(f"da.{title}()")), stored().get(name)
    prompt = facts["prompt"] if facts else "a photo of a red apple and a green clock"
    yield f"""```python
import torch
import diffalign as da

pipe = da.load("{show.model}")  # or your own pipeline
prompt = "{prompt}"
call = {{"num_inference_steps": {STEPS}, "guidance_scale": {show.scale:g}}}
rng = torch.Generator().manual_seed({facts["seed"] if facts else 0})
with da.apply(pipe, {show.code}) as session:
    image = pipe(prompt, generator=rng, **call).images[0]
print(session.report())
```"""
    if show.note:
        yield show.note
    yield (
        f"`diffalign techniques {name}` prints this documentation, "
        "`da.supports(pipe)` says whether it acts on your pipeline."
    )


def stored() -> dict[str, dict[str, object]]:
    """The facts of all pictures."""
    return json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}


def picture(name: str) -> Iterator[str]:
    """The pair of a technique, with what it shows and how often."""
    if name not in stored():
        return
    facts, show = stored()[name], SHOWS[name]
    (before, after), (plain, ours), count = facts["right"], facts["nfe"], facts["of"]
    images = "prompts" if show.negates is None else "seeds"
    what = "had the object removed and the other kept" if show.negates is not None else "were right"
    yield f"![without and with {name}, from the same noise](../pairs/{name}.jpg)"
    if show.saves:
        choice = "Shown is the first pair that is right on both sides."
    elif facts["gained"]:
        choice = "Shown is the first image that it made right."
    else:
        choice = "It made no wrong image right; shown is the pair that changed most."
    yield (
        f"Left {show.plain_name}, {plain:g} evaluations; right with it, {ours:g}. Same noise, "
        f"`{show.model}`, scale {show.scale:g}: “{facts['prompt']}”. {choice} "
        f"Of {count} {images} {before} {what} without it and {after} with it."
    )


def measured(name: str) -> Iterator[str]:
    """What the benchmarks say, of each embedded model."""
    empty = True
    for folder in (FOLDER, *sorted(path for path in FOLDER.iterdir() if path.is_dir())):
        for result, lines in sections(name, folder):
            empty = False
            yield from lines
            place = (folder / f"{result}.md").relative_to(FOLDER).as_posix()
            yield f"All rows, and how it was measured: [{result}](../results/{place})."
    if empty:
        yield "No benchmark of quality has been run yet."
    yield from seconds(name)


def sections(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Result -> paragraphs about a technique."""
    for key in READERS:
        if not (folder / f"{key}.json").exists():
            continue
        lines = list(READERS[key](name, read(key, folder)))
        if lines:
            chart = CHARTS.get(key)
            if chart and (folder / chart[0]).exists() and key != "guidance":
                place = (folder / chart[0]).relative_to(FOLDER).as_posix()
                lines.append(f"![{chart[1]}](../results/{place})")
            yield key, lines


def model_of(result: Result) -> str:
    return str(result.options.get("model", "emoji"))


def guidance(name: str, result: Result) -> Iterator[str]:
    """Rows of a rule beside plain guidance."""
    rows = [row for row in result.rows if row["technique"] == name]
    if not rows:
        return
    facts = result.facts
    yield (
        f"**On `{model_of(result)}`**, {facts['prompts']} prompts of GenEval x {facts['seeds']} "
        f"seeds, {result.options['steps']} steps. Plain guidance is best as {facts['best']}: "
        f"{result.row(facts['best'])['score']:.3f}."
    )
    heads = ["setting", "evaluations", "score", "against the best plain scale", "what follows"]
    yield readme.table(heads, [line(row, result) for row in rows])


def line(row: Row, result: Result) -> list[str]:
    """A row of a rule: setting, cost, score, difference, advice."""
    return [
        row["method"],
        f"{row['NFE']:g}",
        f"{row['score'].value:.3f}",
        f"{row['vs best']:+.3f}",
        advice.guidance(row, result),
    ]


def adaptive(name: str, result: Result) -> Iterator[str]:
    if name == "adaptive-guidance":
        yield f"**Its threshold on `{model_of(result)}`.** {advice.adaptive(result)}."


def dynamic(name: str, result: Result) -> Iterator[str]:
    if name == "dynamic-cfg":
        yield f"**On `{model_of(result)}`**: {advice.dynamic(result)}."


def negation(name: str, result: Result) -> Iterator[str]:
    if name == "nag":
        yield f"**On `{model_of(result)}`.** {advice.negation(result)}"


def pladis(name: str, result: Result) -> Iterator[str]:
    if name != "pladis":
        return
    yield f"**On `{model_of(result)}`.** {advice.pladis(result)}"
    heads = ["setting", "score", "against the same guidance without it"]
    rows = [row for row in result.rows if "PLADIS" in row["method"]]
    yield readme.table(
        heads,
        [[r["method"], f"{r['score'].value:.3f}", f"{r['vs the same CFG']:+.3f}"] for r in rows],
    )


def pruning(name: str, result: Result) -> Iterator[str]:
    if name != "cat":
        return
    yield "**Time of a step that leaves tokens out**, at the widths of published models, on a CPU:"
    heads = ["model", "image tokens", "times faster", "a run of 28 steps costs"]
    yield readme.table(
        heads,
        [
            [r["method"], str(r["tokens"]), f"{r['speedup']:.2f}", f"{r['run of 28']:.1f} of them"]
            for r in result.rows
        ],
    )


def pruning_quality(name: str, result: Result) -> Iterator[str]:
    if name == "cat":
        yield f"**On `{model_of(result)}`.** {advice.pruning(result)}"


READERS = {
    "guidance": guidance,
    "adaptive": adaptive,
    "dynamic": dynamic,
    "negation": negation,
    "pladis": pladis,
    "pruning": pruning,
    "pruning_quality": pruning_quality,
}
"""Result -> what it says of a technique."""


def seconds(name: str) -> Iterator[str]:
    """Time beside the plain run, on one thread."""
    title = da.techniques()[name].__name__
    rows = [row for row in read("cost").rows if row["technique"].split(",")[0] == title]
    for row in rows:
        yield (
            f"**Seconds** on one CPU thread: {row['ratio']:.2f} of the plain run "
            f"({row['technique']}; {row['counted']}). See [cost](../results/cost.md)."
        )


__all__ = ["Estimate", "index", "page"]
