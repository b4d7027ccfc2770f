"""Write the README's table of techniques from their documentation and the measured results.

    python benchmarks/readme.py [--check]

Every figure comes from a JSON file in benchmarks/results; a technique without one says why.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import diffalign as da
from diffalign.cli.techniques import describe
from diffalign.core.registry import BUILTIN

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- techniques: .*? -->\n).*?(<!-- end of techniques -->)", flags=re.S)
ELSEWHERE = {"cfg-zero-star": "not on `emoji`: flow models only"}


def results(name: str) -> list[dict[str, Any]]:
    """The rows of a result file; none where it was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def measured(name: str) -> str:
    """What was measured of a technique, in one cell."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if name == "cfg":
        plain = [row for row in results("guidance") if re.fullmatch(r"CFG [\d.]+", row["method"])]
        if plain:
            best, off = (
                max(plain, key=lambda row: row["score"]),
                next(row for row in plain if row["method"] == "CFG 1"),
            )
            scale = best["method"].removeprefix("CFG ")
            return f"best of the sweep: {best['score']:.3f} at scale {scale}; {off['score']:.3f} without guidance"
    for file in ("guidance", "negation", "pladis"):
        rows = [row for row in results(file) if row.get("technique") == name]
        if rows:
            row = rows[0]
            against = next(
                (
                    value.partition(" (")[0]
                    for key, value in row.items()
                    if key.startswith("vs best")
                ),
                "",
            )
            said = (
                f"{row['method']}: {against}, {round(row['NFE'], 1):g} NFE. {row['advice']}"
                if against
                else row["advice"]
            )
            repairs = [
                f" {other['method']}: {other['advice']}"
                for other in rows[1:]
                if "too strong" in other["advice"]
            ]
            return said + "".join(repairs)
    return "not measured yet"


def row_of(name: str) -> str:
    """The README's row of a technique."""
    module = BUILTIN[name].partition(":")[0]
    source = module.replace(".", "/") + ".py"
    test = f"tests/{Path(source).parent.relative_to('diffalign')}/test_{Path(source).stem}.py"
    test = test if (ROOT / test).is_file() else str(Path(test).parent)
    facts = describe(name, da.techniques()[name])
    cost = facts["cost"].partition(". ")[0].rstrip(".")
    return f"| `{name}` | {facts['paper']} | {cost} | {measured(name)} | [code]({source}) [test]({test}) |"


def render(text: str) -> str:
    """The README with its table written anew."""
    table = (
        "| name | paper | cost | measured on `emoji` | where |\n|---|---|---|---|---|\n"
        + "".join(row_of(name) + "\n" for name in BUILTIN)
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
