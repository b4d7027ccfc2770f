"""Write the tables of techniques, methods and rewards: a short one by purpose into README.md,
techniques of guidance and attention into guidance/README.md, of token pruning into
pruning/README.md, all methods into search/README.md and noise_opt/README.md, all rewards into
rewards/README.md.

    python benchmarks/readme.py [--check]

Every figure comes from a JSON file in benchmarks/results; a technique without one says why. Papers
and costs come from the techniques' documentation.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import advice
from results import FOLDER, Estimate, Result, Row, read

import diffalign as da
from diffalign.cli.techniques import describe, paper_of, plain
from diffalign.core.search import Method
from diffalign.rewards.base import REWARDS
from diffalign.seams.support import cost_of

ROOT = Path(__file__).parents[1]
RESULTS = FOLDER
SECTION = re.compile(
    r"(<!-- (techniques|methods|rewards): [^>]* -->\n).*?(<!-- end of \2 -->)", flags=re.S
)
ELSEWHERE = {"cfg-zero-star": "Flow models only, so not on `emoji`."}
# the row of NAG(5), in the window of steps that is looked up for the model
NAG_ROW = "NAG 5"
MISSING = ("–", "–", "–", "Not measured yet.")


def stored(name: str, model: str = "") -> Result | None:
    """A result, of the first embedded model if none is named; None where it was not measured."""
    folder = RESULTS / model
    return read(name, folder) if (folder / f"{name}.json").exists() else None


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PURPOSES = {
    "adaptive-guidance": "the same image for fewer evaluations",
    "linear-ag": "the same for still fewer, fitted to your model",
    "cat": "transformers: computes a share of the tokens",
    "nag": "obeys a negative prompt, guided or not, distilled models too",
    "apg": "a high scale that does not spoil the image",
    "interval-cfg": "guides in a part of the steps only",
    "dynamic-cfg": "a reward chooses the scale of each step",
    "pladis": "sharper attention to the text",
    "cfg": "plain guidance, bit for bit your pipeline's own",
    "rescaled-cfg": "keeps the contrast of a high scale in bounds",
    "magnitude-aware": "a lower scale where the branches differ much",
    "scheduled-cfg": "a scale that follows a curve over the steps",
    "beta-cfg": "guides most in the middle of the run",
    "tcfg": "drops what the two predictions do not share",
    "fdg": "one scale for the layout, another for details",
    "cfg-plus-plus": "CFG++ on unmodified DDIM and Euler",
    "cfg-zero-star": "flow models: a fitted unconditional branch, still first steps",
    "s2-guidance": "away from itself without random blocks",
    "skip-layer-guidance": "away from itself without chosen blocks",
    "pag": "away from itself without self-attention",
    "seg": "away from itself with blurred self-attention",
    "auto-guidance": "away from a weaker version of the model",
}
"""What a technique does for a reader, in at most ten words; those of the README first. One that is
not here is described by the first sentence of its documentation."""
SHORT = 5
"""How many of them the README shows."""
SEARCHES = {
    "best-of-n": ("best-of-n", 800, "draws more images, keeps the one that a reward likes"),
    "beam": ("beam, svdd", 800, "branches inside the image, keeps what a reward likes"),
}
"""Methods of the README: row of the search benchmark, denoiser rows, and what it does."""
FLOW = "emoji-dit"
"""The second model of the tables."""
TREE = "tree 6-3-3-3, keep 2"
"""The row of the video benchmark that the README shows."""
STEPS = 20
"""Of the images in the search benchmark; each takes two denoiser rows."""
TIMING = 0.03
"""Ratios of time this near to 1 are called none."""


def by_purpose() -> str:
    """The README's table: techniques that most readers want, one short row each."""
    rows = [
        [
            f"[`{da.techniques()[name].__name__}`]({files_of(da.techniques()[name])[0]})",
            *short(name),
        ]
        for name in list(PURPOSES)[:SHORT]
    ]
    rows += [*searches(), *videos()]
    return table(["technique", "what it does for you", "cost", "measured"], rows)


def searches() -> list[list[str]]:
    """The README's rows of searches, by the judge that neither a search nor its reward has seen."""
    result = stored("search")
    if result is None:
        return []
    one = result.facts["from one image to the best"]["emoji-judge: all"]["one"]
    rows = []
    for name, (method, limit, what) in SEARCHES.items():
        cls, row = da.methods()[name], result.row(method, NFE=limit)
        times = limit / (2 * STEPS)
        gain = f"right images {100 * one:.0f}% to {100 * row['judge'].value:.0f}%"
        rows.append(
            [f"[`{cls.__name__}`]({files_of(cls)[0]})", what, f"{times:g} times as many", gain]
        )
    return rows


def videos() -> list[list[str]]:
    """The README's row of videos, by the judge that neither the search nor its reward has seen."""
    result = stored("video")
    if result is None:
        return []
    one, row = (result.row(method) for method in ("one sample", TREE))
    cls, times = da.methods()["tree-of-frames"], row["rows"] / one["rows"]
    gain = f"right videos {100 * one['audit'].value:.0f}% to {100 * row['audit'].value:.0f}%"
    what = "grows a video chunk by chunk, drops weak beginnings"
    return [[f"[`{cls.__name__}`]({files_of(cls)[0]})", what, f"{times:.1f} times as many", gain]]


def short(name: str) -> list[str]:
    """What a technique is for, its cost beside plain guidance, and its result, in a few words."""
    return [purpose(name), costs(name), outcome(name)]


def purpose(name: str) -> str:
    """What a technique does for a reader."""
    what = str(describe(name, da.techniques()[name])["what"])
    return PURPOSES.get(name) or what.partition(". ")[0].rstrip(".")


def costs(name: str) -> str:
    """What a technique costs beside plain guidance: evaluations, else time; words if unmeasured."""
    row = first_row(name)
    if row is not None:
        result = read("guidance", RESULTS)
        saved = 1.0 - row["NFE"] / result.row(result.facts["best"])["NFE"]
        if abs(saved) >= 0.01:
            return f"{100 * abs(saved):.0f}% {'fewer' if saved > 0 else 'more'} evaluations"
    title = da.techniques()[name].__name__
    times = stored("cost")
    rows = times.rows if times else []
    ratio = next((r["ratio"] for r in rows if r["technique"].split(",")[0] == title), None)
    if name == "cat" and (pruning := stored("pruning_quality")) is not None:
        full, pruned = (pruning.row(way, steps=28)["seconds"] for way in ("28 steps", "CAT 0.3"))
        ratio = pruned / full
    if ratio is None:
        return re.split(r"[;,.]| inside", cost_of(da.techniques()[name]))[0]
    if abs(ratio - 1.0) <= TIMING:
        return "nothing"
    return f"{100 * abs(ratio - 1.0):.0f}% {'less' if ratio < 1 else 'more'} time"


def first_row(name: str) -> Row | None:
    """A rule's row at the model's best scale; None where it was not measured."""
    result = stored("guidance")
    if result is None:
        return None
    return next((row for row in result.rows if row["technique"] == name), None)


def outcome(name: str) -> str:
    """A technique's result in a few figures."""
    if name == "nag":
        return _removal()
    if name == "apg":
        return _repair(name) + _on_flow_too(name)
    if name == "cfg":
        return "the baseline"
    row = first_row(name)
    if name == "pladis" and (result := stored("pladis")) is not None:
        row = result.row(result.facts["default"])
    if name == "cat" and (result := stored("pruning_quality")) is not None:
        gain = result.row("CAT 0.3", steps=28)["PSNR vs fewer steps"].value
        return f"{gain:+.1f} dB against fewer steps"
    return "not measured yet" if row is None else f"{row['vs best']:+.3f}" + _on_flow_too(name)


def _on_flow_too(name: str) -> str:
    """The same difference on the second model, without its interval; nothing if unmeasured."""
    figure = on_flow(name)
    return "" if figure == "–" else f"; `{FLOW}` {figure.partition(' ')[0]}"


def _repair(name: str) -> str:
    """The largest gain over plain guidance at the same scale."""
    result = stored("guidance")
    if result is None:
        return "not measured yet"
    rows = [row for row in result.rows if row["technique"] == name]
    best = max(rows, key=lambda row: row["vs CFG at its scale"].value)
    return f"{best['vs CFG at its scale']:+.3f} over plain at scale {best['scale']:g}"


def _removal(model: str = "") -> str:
    """How often NAG removes an object and keeps the other, beside CFG's negative prompt."""
    result = stored("negation", model)
    if result is None:
        return "not measured yet"
    ours = result.row(NAG_ROW, negated="object")
    rows = (ours, advice.at_equal_strength(result, ours))
    shares = [f"{100 * row['gone and kept'].value:.0f}%" for row in rows]
    return f"obeyed in {shares[0]}; CFG's negative prompt, equally strong: {shares[1]}"


ROOMS = {"guidance": ("guidance", "attention"), "pruning": ("pruning",)}
"""Folder of a catalogue -> the rooms whose techniques it lists."""


def listed(folder: str) -> list[str]:
    """The techniques of a catalogue, by name."""
    places = tuple(f"diffalign.{room}." for room in ROOMS[folder])
    known = da.techniques().items()
    return [name for name, cls in known if cls.__module__.startswith(places)]


def pruning() -> str:
    """The table of ``pruning/README.md``."""
    heads = ["technique", "what it does", "paper", "cost", "test"]
    rows = []
    for name in listed("pruning"):
        source, test = files_of(da.techniques()[name])
        facts = describe(name, da.techniques()[name])
        place, cost = f"[`{name}`](../{source})", facts["cost"].partition(". ")[0].rstrip(".")
        rows.append([place, facts["what"], linked(facts["paper"]), cost, f"[test](../{test})"])
    return table(heads, rows)


def catalogue() -> str:
    """The table of ``guidance/README.md``: every technique of guidance and attention."""
    heads = [
        "technique",
        "paper",
        "cost",
        "NFE",
        "score against best CFG: `emoji`",
        f"`{FLOW}`",
        "what follows on `emoji`",
        "test",
    ]
    return table(heads, [row_of(name) for name in listed("guidance")])


def row_of(name: str) -> list[str]:
    """The catalogue's row of a technique."""
    source, test = files_of(da.techniques()[name])
    facts = describe(name, da.techniques()[name])
    return [
        f"[`{name}`](../{source})",
        linked(facts["paper"]),
        facts["cost"].partition(". ")[0].rstrip("."),
        *measured(name),
        f"[test](../{test})",
    ]


def files_of(cls: type) -> tuple[Path, Path]:
    """The file of a class, and its test or the folder of its tests."""
    source = Path(cls.__module__.replace(".", "/") + ".py")
    test = Path("tests", source.parent.relative_to("diffalign"), f"test_{source.name}")
    return source, test if (ROOT / test).is_file() else test.parent


def linked(paper: str) -> str:
    """A paper whose identifier is a link."""
    return re.sub(r"arXiv:(\S+)", r"[\1](https://arxiv.org/abs/\1)", paper)


def methods(room: str) -> str:
    """The table of ``<room>/README.md``: every method of that room."""
    heads = ["method", "what it does", "needs", "paper", "cost", "test"]
    rows = [
        method_row(name, cls)
        for name, cls in da.methods().items()
        if cls.__module__.startswith(f"diffalign.{room}.")
    ]
    return table(heads, rows)


def method_row(name: str, cls: type[Method[Any]]) -> list[str]:
    """The catalogue's row of a method."""
    source, test = files_of(cls)
    what = plain(" ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()))
    needs = ["a sampler that draws noise"] if cls.branches else []
    needs += ["a reward with gradient"] if cls.needs_gradient else []
    needs += ["a pipeline that goes on from a chunk"] if cls().chunks == "needs" else []
    return [
        f"[`{name}`](../{source})",
        what.partition(". ")[0].rstrip(".") + ".",
        " and ".join(needs) or "–",
        linked(paper_of(cls)),
        cost_of(cls).partition(". ")[0].rstrip("."),
        f"[test](../{test})",
    ]


def rewards() -> str:
    """The table of ``rewards/README.md``: every reward."""
    heads = ["reward", "what it is", "gradient", "size", "memory", "licence", "best at", "paper"]
    return table([*heads, "test"], [reward_row(info) for info in da.rewards.available()])


def reward_row(info: da.rewards.RewardInfo) -> list[str]:
    """The catalogue's row of a reward."""
    make: Any = REWARDS.get(info.name)
    source, test = files_of(make)
    facts = info.facts
    return [
        f"[`{info.name}`](../{source})",
        f"{info.description}.",
        "yes" if info.differentiable else "no",
        facts.size,
        facts.memory,
        facts.licence,
        facts.best,
        linked(paper_of(make)) or "–",
        f"[test](../{test})",
    ]


def measured(name: str) -> tuple[str, str, str, str]:
    """Evaluations per image, difference of score to the best plain scale on the first model and on
    the second, and what follows."""
    if name in ELSEWHERE:
        return _flow_only(name)
    result = stored({"nag": "negation", "pladis": "pladis"}.get(name, "guidance"))
    if result is None:
        return MISSING
    if name == "nag":
        ours = result.row(NAG_ROW, negated="object")
        return evaluations(ours), "–", on_flow(name), f"{ours['method']}: {_removal()}."
    if name == "pladis":
        row = result.row(result.facts["default"])
        score = f"{row['vs best']:+.3f}"
        return evaluations(row), score, on_flow(name), advice.pladis(result)
    if name == "cfg":
        best = result.row(result.facts["best"])
        score = f"{best['vs best'].value:+.3f}"
        return evaluations(best), score, on_flow(name), f"{_plain(result)}."
    rows = [row for row in result.rows if row["technique"] == name]
    if not rows:
        return MISSING
    nfe, score, text = judged(rows, result)
    return nfe, score, on_flow(name), text


def _plain(result: Result) -> str:
    """The scores of plain guidance at its best scale and of none."""
    best, off = (result.row(method) for method in (result.facts["best"], "CFG 1"))
    scores = [row["score"].value for row in (best, off)]
    scale = best["method"].removeprefix("CFG ")
    return f"{scores[0]:.3f} at scale {scale}, the best; {scores[1]:.3f} without guidance"


def _flow_only(name: str) -> tuple[str, str, str, str]:
    """``measured`` for a technique that the first model refuses."""
    result = stored("guidance", FLOW)
    rows = [row for row in result.rows if row["technique"] == name] if result else []
    if result is None or not rows:
        return "–", "–", "–", ELSEWHERE[name]
    nfe, score, text = judged(rows, result)
    return nfe, "–", score, f"{ELSEWHERE[name]} `{FLOW}`, {text}"


def on_flow(name: str) -> str:
    """A technique's figure on the second model: against its best plain scale, or against plain
    guidance at the same scale where that is too strong, as the cell says."""
    result = stored({"nag": "negation", "pladis": "pladis"}.get(name, "guidance"), FLOW)
    if result is None:
        return "–"
    if name == "nag":
        return _removal(FLOW)
    if name == "pladis":
        return f"{result.row(result.facts['default'])['vs best']:+.3f}"
    if name == "cfg":
        return _plain(result)
    rows = [row for row in result.rows if row["technique"] == name]
    if not rows:
        return "–"
    row, best = rows[0], result.row(result.facts["best"])
    if row["scale"] > best["scale"]:
        gain = row["vs CFG at its scale"]
        return f"{gain:+.3f} over plain at scale {row['scale']:g}"
    return f"{row['vs best']:+.3f}"


def judged(rows: list[Row], result: Result) -> tuple[str, str, str]:
    """The first row of a rule, and the rows that repair a scale that is too strong."""
    sentences = [advice.guidance(row, result) for row in rows]
    repairs = [
        f"{row['method']}: {sentence}"
        for row, sentence in zip(rows[1:], sentences[1:], strict=True)
        if "too strong" in sentence
    ]
    gain: Estimate = rows[0]["vs best"]
    text = " ".join([f"{rows[0]['method']}: {sentences[0]}", *repairs])
    return evaluations(rows[0]), f"{gain:+.3f}", text


def evaluations(row: Row) -> str:
    """Denoiser evaluations per image."""
    return f"{round(row['NFE'], 1):g}"


PAGES: dict[str, Callable[[], str]] = {
    "README.md": by_purpose,
    "guidance/README.md": catalogue,
    "pruning/README.md": pruning,
    "search/README.md": functools.partial(methods, "search"),
    "noise_opt/README.md": functools.partial(methods, "noise_opt"),
    "rewards/README.md": rewards,
}


def render(name: str, text: str) -> str:
    """A page with its table written anew."""
    if not SECTION.search(text):
        raise ValueError(
            f"{name}: expected the two comments around the generated table; put them back"
        )
    return SECTION.sub(lambda match: match[1] + PAGES[name]() + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail when a table is not what the results say",
    )
    options = parser.parse_args()
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = render(name, old)
        if options.check and new != old:
            sys.exit(
                f"{name}: the generated table is not what the results say; run python "
                "benchmarks/readme.py"
            )
        if not options.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
