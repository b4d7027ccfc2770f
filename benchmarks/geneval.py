"""GenEval of an embedded model: all 553 official prompts x 4 seeds, its judge's verdicts, and how
far the second judge agrees.

    python benchmarks/geneval.py [--scale 3] [--runs-folder runs/geneval]

The overall is official in form (553 x 4, unweighted mean of tags) and ours in judge: it compares
runs of this model, not models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from results import Estimate, Row, command_line, save, second_judge
from rich.progress import Progress

import diffalign as da
from diffalign.embedded import load
from diffalign.eval.evidence import Config, Measured, measure, tag_of
from diffalign.eval.statistics import interval
from diffalign.tasks.geneval.verdict import TAGS, prompts

COLUMNS = {
    "score": "share of correct images; overall is the unweighted mean of the tags",
    "second judge agrees": "share of images with the same verdict by emoji-judge-audit",
}


def main() -> None:
    parser = command_line(__doc__, runs_folder="runs/geneval", scale=3.0, steps=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = load("emoji"), load("emoji-judge")
    config = Config(f"CFG {options.scale:g}", (da.CFG(options.scale),), steps=options.steps)
    folder = Path(options.runs_folder) / f"{options.scale:g}-{options.steps}"
    with Progress() as bar:
        task = bar.add_task(config.name, total=4 * len(prompts()))
        run = measure(
            pipe,
            judge,
            config,
            folder,
            prompt_ids=range(len(prompts())),
            samples=4,
            scorers={"audit": second_judge("emoji")},
            progress=lambda n: bar.advance(task, n),
        )
    facts = {
        "prompts": len(prompts()),
        "samples": 4,
        "seconds per image": run.mean("seconds"),
    }
    save("geneval", table(run), options, COLUMNS, facts)


def table(run: Measured) -> list[Row]:
    """A row for each tag and one for all."""
    values = run.per_prompt()
    rows: list[Row] = []
    for tag in (*TAGS, "overall"):
        records = [r for r in run.records if tag in ("overall", tag_of(r["prompt_id"]))]
        ids = sorted({r["prompt_id"] for r in records})
        part = interval([values[n] for n in ids], [tag] * len(ids))
        agree = sum(r["correct"] == bool(r["audit"]) for r in records) / len(records)
        rows.append(
            {
                "tag": tag,
                "images": len(records),
                "score": Estimate.of(run.score() if tag == "overall" else part),
                "second judge agrees": agree,
            }
        )
    return rows


if __name__ == "__main__":
    main()
