"""Write docs/beside.md: which techniques work beside what else a pipeline may carry.

    python benchmarks/beside.py [--check]

The page is made from the list that the tests check cell by cell, so a new technique or a new
neighbour stands in it after the next run.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from diffalign.core.registry import techniques
from diffalign.testing.beside import NEIGHBOURS, Neighbour
from diffalign.testing.beside.check import is_absent

PAGE = Path(__file__).parents[1] / "docs" / "beside.md"
HEAD = """# Beside what else a pipeline carries

A pipeline may already have a LoRA, an IP-Adapter, a cache, a compiled ControlNet, a callback. Each
technique has a cell beside each of them, for tiny pipelines of real diffusers classes. `yes` means:
switched off it changes no bit, switched on it is right, and afterwards the pipeline is bit for bit
what it was. `no` means that it refuses with the sentence below the table and changes nothing.
`–` means that the technique does not exist on these families, whatever else they carry.

Right is what the last column of the first table says. *Branches*: every prediction equals that of
the pipeline itself, run with that branch only. *Images*: every image of a batch equals the image
made alone. *Without*: the result equals the same computed without the mechanism (fused instead of
loaded, resident instead of offloaded). *Faint*: what is computed from earlier steps stays what it
is natively under a technique of almost no weight, and images do not mix. The perturbed, smoothed
and weaker passes of PAG, SEG and AutoGuidance are compared with attention written out, and with the
pipeline whose denoiser is the weaker one.

On 2026-11-28 and 29, with diffusers 0.42.1, torch 2.14.1 and torchao 0.18.0, every technique was
run beside every neighbour on the first class that is named, CAT on every class that it serves, and
in the end each cell was as the tables say. On the other classes one technique of each way of acting
was run, and those that the first class does not have, except beside models compiled in place, by
blocks or as a full graph. Cells that were not run are what the library declares.

This page is made by `python benchmarks/beside.py`; `pytest -m exhaustive tests/beside` checks every
cell.
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def short(pipeline: str) -> str:
    """A pipeline class without its last word."""
    return pipeline.removesuffix("Pipeline")


def oracles(neighbour: Neighbour) -> str:
    """What is compared beside a neighbour."""
    exact = "without, bit for bit" if neighbour.bound == 0.0 else "without"
    named = {
        "branches": neighbour.branches,
        "images": neighbour.images,
        exact: neighbour.without is not None,
        "faint": neighbour.remembers,
    }
    return ", ".join(name for name, applies in named.items() if applies)


def overview() -> str:
    """Every neighbour: where it was tried and what was compared."""
    rows = [
        [n.name, n.note or "", ", ".join(map(short, n.pipelines)), oracles(n)] for n in NEIGHBOURS
    ]
    return table(["beside", "", "tried on", "compared with"], rows)


class Notes(list[str]):
    """Footnotes, each sentence once."""

    def mark(self, text: str) -> str:
        """The number of a footnote."""
        if text not in self:
            self.append(text)
        return str(self.index(text) + 1)


def cell(neighbour: Neighbour, name: str, notes: Notes) -> str:
    """What is so of a technique beside a neighbour."""
    cls = techniques()[name]
    present = [
        pipeline
        for pipeline in neighbour.pipelines
        if not is_absent(name, pipeline, neighbour.variant, neighbour.text)
    ]
    words = {pipeline: neighbour.refusal(name, cls, pipeline) for pipeline in present}
    refused = [pipeline for pipeline in present if words[pipeline]]
    if not present:
        return "–"
    if not refused:
        return "yes"
    mark = notes.mark(words[refused[0]])
    if len(refused) == len(present):
        return f"no ({mark})"
    return f"yes, not on {', '.join(map(short, refused))} ({mark})"


def group_table(name: str, neighbours: list[Neighbour]) -> str:
    """The table of one group, with its refusals below."""
    notes = Notes()
    rows = [[f"`{t}`", *(cell(n, t, notes) for n in neighbours)] for t in techniques()]
    text = f"\n## {name}\n\n" + table(["technique", *(n.name for n in neighbours)], rows)
    return text + "".join(f"\n({i}) “… {words} …”\n" for i, words in enumerate(notes, 1))


def page() -> str:
    """The whole page."""
    groups = groupby(NEIGHBOURS, key=lambda neighbour: neighbour.group)
    return HEAD + "\n" + overview() + "".join(group_table(name, list(n)) for name, n in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when it is old")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/beside.md is old; run python benchmarks/beside.py")


if __name__ == "__main__":
    main()
