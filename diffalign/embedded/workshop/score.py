"""Judge a training state of ``emoji`` on official GenEval prompts: ``python -m
diffalign.embedded.workshop.score --out runs/emoji [--prompts 120]``.

Evenly spaced prompts of each category, one image each, DDIM with 20 steps; verdicts by GenEval's
rules on the embedded judge's detections. One JSON line with the category scores is appended to
``scores.jsonl``, and a grid of the pictures is written beside it. With 20 prompts a category a
score has a standard error of up to .11: this follows a run, it is not the published figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.core.types import Json, Pipeline
from diffalign.embedded.load import load
from diffalign.embedded.workshop.train_denoiser import STATE, export
from diffalign.embedded.workshop.training import load_state
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import verdicts
from diffalign.tasks.geneval.verdict import TAGS, prompts


def spread_prompts(count: int) -> list[Json]:
    """``count`` official prompts (a multiple of six), evenly spaced within each category, as
    metadata records."""
    each = count // len(TAGS)
    records: list[Json] = []
    for tag in TAGS:
        official = [dict(record) for record in prompts() if record["tag"] == tag]
        records += [official[i * len(official) // each] for i in range(each)]
    return records


@torch.no_grad()
def score(
    pipe: Pipeline,
    records: Sequence[Json],
    scale: float,
    steps: int,
    seed: int,
    batch: int = 16,
) -> tuple[Tensor, list[bool]]:
    """Images [N, 3, 64, 64] in [0, 1] of the prompts and the judge's verdict on each."""
    judge = load("emoji-judge")
    jobs = jobs_of((record["prompt"] for record in records), base=seed)
    call = {"num_inference_steps": steps, "guidance_scale": scale}
    images: list[Tensor] = []
    correct: list[bool] = []
    for results in samples(pipe, (), jobs, batch=batch, call=call):
        stack = torch.stack([result.image for result in results])
        part = records[len(correct) : len(correct) + len(results)]
        answers = verdicts(judge, stack, part)
        images.append(stack)
        correct += [answer is not None and answer.correct for answer in answers]
    return torch.cat(images), correct


def grid(
    images: Tensor,
    records: Sequence[Json],
    correct: Sequence[bool],
    columns: int = 12,
    zoom: int = 2,
) -> Image.Image:
    """Pictures with their prompts below, green where the judge found what was asked."""
    side = 64 * zoom
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, record, good) in enumerate(zip(images, records, correct, strict=True)):
        x, y = i % columns * (side + 8), i // columns * (side + 28)
        pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = record["prompt"].removeprefix("a photo of ")
        for line in range(2):
            pen.text(
                (x, y + side + 11 * line),
                text[22 * line : 22 * line + 22],
                fill="darkgreen" if good else "red",
            )
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/emoji"), help="folder of the training state"
    )
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--scale", type=float, nargs="+", default=[4.0], help="guidance scales")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the weights of the last update instead of the averaged ones",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / STATE.format(rank=0)
    state = load_state(path)
    if state is None:
        raise ValueError(f"--out must hold a training state; {path} is none. Train first.")
    pipe = export(path, options.vae, options.out / "tokenizer", None, averaged=not options.raw)
    pipe.set_progress_bar_config(disable=True)
    records = spread_prompts(options.prompts)
    for scale in options.scale:
        start = time.monotonic()
        images, correct = score(pipe, records, scale, options.steps, options.seed)
        means = {
            tag: [
                good for record, good in zip(records, correct, strict=True) if record["tag"] == tag
            ]
            for tag in TAGS
        }
        result = {tag: round(sum(goods) / len(goods), 3) for tag, goods in means.items()}
        line = {
            "updates": state["trainer"]["done"],
            "scale": scale,
            "steps": options.steps,
            "averaged": not options.raw,
        }
        line |= result | {
            "mean": round(sum(result.values()) / 6, 3),
            "prompts": len(records),
            "seconds": round(time.monotonic() - start, 1),
        }
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        grid(images, records, correct).save(
            options.out / f"grid-{line['updates']:06d}-{scale:g}.png"
        )


if __name__ == "__main__":
    main()
