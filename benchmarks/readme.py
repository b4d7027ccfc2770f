"""Write the README's table of techniques from their documentation and the measured results.

    python benchmarks/readme.py [--check]

Every figure comes from a JSON file in benchmarks/results; a technique without one says why.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import advice
from results import FOLDER, Result, Row, read

import diffalign as da
from diffalign.cli.techniques import describe

ROOT = Path(__file__).parents[1]
RESULTS = FOLDER
SECTION = re.compile(r"(<!-- techniques: .*? -->\n).*?(<!-- end of techniques -->)", flags=re.S)
ELSEWHERE = {"cfg-zero-star": "not on `emoji`: flow models only"}


def stored(name: str) -> Result | None:
    """A result; None where it was not measured."""
    return read(name, RESULTS) if (RESULTS / f"{name}.json").exists() else None


def measured(name: str) -> str:
    """What was measured of a technique, in one cell."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    file = {"nag": "negation", "pladis": "pladis"}.get(name, "guidance")
    result = stored(file)
    if result is None:
        return "not measured yet"
    if name == "nag":
        return advice.negation(result)
    if name == "pladis":
        return told(result.row(result.facts["default"]), advice.pladis(result))
    if name == "cfg":
        best, off = (
            result.row(method)["score"].value for method in (result.facts["best"], "CFG 1")
        )
        scale = result.facts["best"].removeprefix("CFG ")
        return f"best of the sweep: {best:.3f} at scale {scale}; {off:.3f} without guidance"
    rows = [row for row in result.rows if row["technique"] == name]
    if not rows:
        return "not measured yet"
    sentences = [advice.guidance(row, result) for row in rows]
    repairs = [
        f" {row['method']}: {sentence}"
        for row, sentence in zip(rows[1:], sentences[1:], strict=True)
        if "too strong" in sentence
    ]
    return told(rows[0], sentences[0]) + "".join(repairs)


def told(row: Row, sentence: str) -> str:
    """A row beside the best plain scale, and what follows from it."""
    return f"{row['method']}: {row['vs best']:+.3f}, {round(row['NFE'], 1):g} NFE. {sentence}"


def row_of(name: str) -> str:
    """The README's row of a technique."""
    module = da.techniques()[name].__module__
    source = module.replace(".", "/") + ".py"
    test = f"tests/{Path(source).parent.relative_to('diffalign')}/test_{Path(source).stem}.py"
    test = test if (ROOT / test).is_file() else str(Path(test).parent)
    facts = describe(name, da.techniques()[name])
    cost = facts["cost"].partition(". ")[0].rstrip(".")
    links = f"[code]({source}) [test]({test})"
    return f"| `{name}` | {facts['paper']} | {cost} | {measured(name)} | {links} |"


def render(text: str) -> str:
    """The README with its table written anew."""
    table = (
        "| name | paper | cost | measured on `emoji` | where |\n|---|---|---|---|---|\n"
        + "".join(row_of(name) + "\n" for name in da.techniques())
    )
    if not SECTION.search(text):
        raise ValueError(
            "README.md: expected the two comments around the table of techniques; put them back"
        )
    return SECTION.sub(lambda found: found[1] + table + found[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail when the table is not what the results say",
    )
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old)
    if options.check:
        sys.exit(
            "README.md: the table of techniques is not what the results say; run python "
            "benchmarks/readme.py"
            if new != old
            else 0
        )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
