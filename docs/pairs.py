"""Draws the picture of the README: ``python docs/pairs.py``.

Three pairs on embedded models: a technique that costs less, one that obeys, and a search. They were
chosen to show what each is for; how often it happens is measured in ``benchmarks``.
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
from torch import Tensor

import diffalign as da
from diffalign.eval.evidence import seed_of
from diffalign.generate.samples import Job, picture, samples

FILE = Path(__file__).parent / "pairs.png"
STEPS = 20
# pixels, of which the README shows half
SIZE, GAP, MARGIN, WIDTH = 208, 8, 32, 1400


@dataclass(frozen=True, slots=True)
class Side:
    """One image: how it is called, pixels [3, H, W], and what it took."""

    name: str
    image: Tensor
    nfe: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of one prompt."""

    title: str
    prompt: str
    sides: tuple[Side, Side]


def plain_and(
    title: str, prompt: str, seed: int, scale: float, names: tuple[str, str], technique: Any
) -> Pair:
    """One noise of ``emoji`` without and with a technique."""
    pipe = da.load("emoji")
    call = {"num_inference_steps": STEPS, "guidance_scale": scale}
    sides = []
    for name, techniques in zip(names, ((), (technique,)), strict=True):
        (sample,) = next(samples(pipe, techniques, [Job(prompt, seed, name)], batch=1, call=call))
        sides.append(Side(name, sample.image, sample.report.nfe))
    return Pair(title, prompt, (sides[0], sides[1]))


def first_and_best(title: str, prompt: str) -> Pair:
    """The first image of a search on ``emoji`` and its result."""
    result = da.align(
        da.load("emoji"),
        prompt,
        method=da.BestOfN(6),
        reward="emoji-clip",
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    )
    first = Side("first image", result.first.image, 2 * STEPS)
    return Pair(title, prompt, (first, Side("best of 6", result.tensor, result.ledger.nfe)))


def pairs() -> list[Pair]:
    """The three pairs."""
    negative = "a photo of a cake"
    return [
        plain_and(
            "The same image for less",
            "a photo of an apple and a banana",
            1,
            3.0,
            ("plain guidance", "LinearAG"),
            da.LinearAG(),
        ),
        plain_and(
            "A negative prompt obeyed",
            "a photo of a hair drier and a cake",
            seed_of(86, 1),
            1.0,
            ("ignored", "NAG"),
            da.NAG(5.0, negative_prompt=negative),
        ),
        first_and_best("A wrong count made right", "a photo of two clocks"),
    ]


def draw(pairs: list[Pair]) -> Figure:
    """Pairs side by side: title and prompt above, name and evaluations below each image."""
    height = 2 * MARGIN + SIZE + 104
    figure = plt.figure(figsize=(WIDTH / 200, height / 200), dpi=200, facecolor=PAPER)
    step = (WIDTH - 2 * MARGIN - (2 * SIZE + GAP)) / 2

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - y / height, words, va="center", **style)

    for column, pair in enumerate(pairs):
        edge = MARGIN + column * step
        text(edge, MARGIN, pair.title, color=INK, fontsize=8.4, weight="bold")
        text(edge, MARGIN + 32, pair.prompt, color=QUIET, fontsize=7.4)
        for number, side in enumerate(pair.sides):
            x, y = edge + number * (SIZE + GAP), MARGIN + 60
            area = (x / WIDTH, 1 - (y + SIZE) / height, SIZE / WIDTH, SIZE / height)
            axes = figure.add_axes(area)
            axes.axis("off")
            axes.imshow(picture(side.image).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            text(x, y + SIZE + 22, side.name, color=INK, fontsize=7.8)
            text(x, y + SIZE + 50, f"{side.nfe:g} evaluations", color=QUIET, fontsize=7.4)
    return figure


def main() -> None:
    torch.set_num_threads(1)
    draw(pairs()).savefig(FILE, facecolor=PAPER)


if __name__ == "__main__":
    main()
