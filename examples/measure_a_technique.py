"""Measure a technique on a benchmark, paired, with an interval: what ``diffalign eval`` does.

Both runs draw the same prompts from the same noise. A judge says which images are right; the
difference is paired by prompt. ``measure/report/index.html`` shows every image. Eight prompts are
few: the interval says how little they tell. For a claim leave ``--limit`` out.

It prints:

    emoji: adaptive-guidance: 0.667 right, 26.25 evaluations per image
    emoji: plain: 0.583 right, 40 evaluations per image
    difference +0.083, 95% interval from +0.000 to +0.167
"""

import json
from pathlib import Path

from diffalign.cli import app

COMMON = ["--model", "emoji", "--limit", "8", "--samples", "1", "--quiet"]
RUNS = {"plain": [], "adaptive": ["--technique", "adaptive-guidance"]}


def evaluate(*arguments: str) -> None:
    """``diffalign eval ...``"""
    app(["eval", *arguments], standalone_mode=False)


for name, options in RUNS.items():
    evaluate("geneval", *COMMON, *options, "--output", f"measure/{name}")
evaluate("report", "measure/plain", "measure/adaptive", "--output", "measure/report", "--quiet")
numbers = json.loads(Path("measure/report/results.json").read_text())
for name, result in numbers["results"].items():
    share = result["mean_of_tags"]["mean"]
    print(f"{name}: {share:.3f} right, {result['nfe']:g} evaluations per image")
(difference,) = numbers["comparisons"]
low, high = difference["low"], difference["high"]
print(f"difference {difference['mean']:+.3f}, 95% interval from {low:+.3f} to {high:+.3f}")
