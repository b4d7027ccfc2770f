"""Draws the picture of the README: ``python docs/pairs.py``.

Three pairs on the embedded model, each of one noise. They were chosen to show what a technique is
for; how often it happens is measured in ``benchmarks``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pictures import INK, PAPER, QUIET
from PIL import Image

import diffalign as da
from diffalign.eval.evidence import seed_of
from diffalign.generate.samples import Job, Sample, picture, samples
from diffalign.tasks.geneval.verdict import prompts

FILE = Path(__file__).parent / "pairs.png"
STEPS = 20
# pixels, of which the README shows half
SIZE, GAP, MARGIN, WIDTH = 208, 8, 32, 1400


@dataclass(frozen=True)
class Pair:
    """One noise without and with a technique."""

    title: str
    # place in GenEval's list, and which of its images
    prompt_id: int
    sample: int
    # of the call of both
    scale: float
    # name and techniques of each side
    plain: tuple[str, tuple[Any, ...]]
    ours: tuple[str, tuple[Any, ...]]


PAIRS = (
    Pair(
        "The same image for less",
        179,
        0,
        1.5,
        ("plain guidance", ()),
        ("AdaptiveGuidance", (da.AdaptiveGuidance(),)),
    ),
    Pair(
        "The cake removed",
        86,
        1,
        1.0,
        ("no guidance", ()),
        ("NAG", (da.NAG(5.0, negative_prompt="a photo of a cake"),)),
    ),
    Pair(
        "Too strong a scale, repaired",
        315,
        0,
        5.0,
        ("plain, scale 5", ()),
        ("APG, scale 5", (da.APG(),)),
    ),
)


def run(pipe: Any, pair: Pair, techniques: tuple[Any, ...]) -> Sample:
    """One image of a pair."""
    prompt = str(prompts()[pair.prompt_id]["prompt"])
    job = Job(prompt, seed_of(pair.prompt_id, pair.sample), "pair")
    call = {"num_inference_steps": STEPS, "guidance_scale": pair.scale}
    return next(samples(pipe, techniques, [job], batch=1, call=call))[0]


def draw(pairs: list[tuple[Pair, list[Sample]]]) -> Figure:
    """Pairs side by side: title and prompt above, name and evaluations below each image."""
    height = 2 * MARGIN + SIZE + 104
    figure = plt.figure(figsize=(WIDTH / 200, height / 200), dpi=200, facecolor=PAPER)
    step = (WIDTH - 2 * MARGIN - (2 * SIZE + GAP)) / 2

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - y / height, words, va="center", **style)

    for column, (pair, sides) in enumerate(pairs):
        left = MARGIN + column * step
        text(left, MARGIN, pair.title, color=INK, fontsize=8.4, weight="bold")
        text(left, MARGIN + 32, sides[0].job.prompt, color=QUIET, fontsize=7.4)
        for side, (sample, (name, _)) in enumerate(
            zip(sides, (pair.plain, pair.ours), strict=True)
        ):
            x, y = left + side * (SIZE + GAP), MARGIN + 60
            area = (x / WIDTH, 1 - (y + SIZE) / height, SIZE / WIDTH, SIZE / height)
            axes = figure.add_axes(area)
            axes.axis("off")
            axes.imshow(picture(sample.image).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            text(x, y + SIZE + 22, name, color=INK, fontsize=7.8)
            cost = f"{sample.report.nfe:g} evaluations"
            text(x, y + SIZE + 50, cost, color=QUIET, fontsize=7.4)
    return figure


def main() -> None:
    torch.set_num_threads(1)
    pipe = da.load("emoji")
    results = [
        (pair, [run(pipe, pair, side[1]) for side in (pair.plain, pair.ours)]) for pair in PAIRS
    ]
    draw(results).savefig(FILE, facecolor=PAPER)


if __name__ == "__main__":
    main()
