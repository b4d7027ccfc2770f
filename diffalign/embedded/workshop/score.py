"""Judge a training state of ``emoji``, or any pipeline folder, on official GenEval prompts.

``python -m diffalign.embedded.workshop.score --out runs/emoji [--prompts 120]``, or ``--pipeline
FOLDER --judge emoji-judge-2 --out FOLDER``, with ``--adapter FOLDER`` what ``train_turbo`` has
written for it. Evenly spaced prompts of each category, one image each,
20 steps of the pipeline's own scheduler; verdicts by GenEval's rules on the embedded judge's
detections. One JSON line with the category scores is appended to ``scores.jsonl``, and a grid of
the pictures is written beside it. With 20 prompts a category a score has a standard error of up to
.11: this follows a run, it is not the published figure.
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
from diffalign.embedded.adapter import adapted
from diffalign.embedded.load import load, pipeline_in
from diffalign.embedded.workshop.train_denoiser import STATE, export
from diffalign.embedded.workshop.training import saved_state
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import Detector, verdicts
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
    judge: Detector | None = None,
) -> tuple[Tensor, list[bool]]:
    """Images [N, 3, H, W] in [0, 1] of the prompts and the verdict of ``judge`` (``emoji-judge``)
    on each."""
    judge = load("emoji-judge") if judge is None else judge
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
) -> Image.Image:
    """Pictures of 128 pixels with their prompts below, green where the judge found what was
    asked."""
    side = 128
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--out", type=Path, default=Path("runs/emoji"), help="folder of the training state")
    add("--vae", type=Path, default=Path("runs/vae/vae"))
    add("--pipeline", type=Path, help="a pipeline folder to judge instead of a training state")
    add("--adapter", type=Path, help="a low-rank difference to it, with its scheduler")
    add("--judge", default="emoji-judge", help="name of an embedded detector")
    add("--prompts", type=int, default=120)
    add("--scale", type=float, nargs="+", default=[4.0], help="guidance scales")
    add("--steps", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--raw", action="store_true", help="the last weights instead of the averaged ones")
    return result


def _opened(options: argparse.Namespace) -> tuple[Pipeline, Json]:
    """The pipeline to judge, and what a line of the scores says of it."""
    if options.pipeline is not None:
        pipe = pipeline_in(options.pipeline)
        if options.adapter is None:
            return pipe, {"pipeline": options.pipeline.name}
        return adapted(pipe, options.adapter), {"pipeline": options.adapter.name}
    path = options.out / STATE.format(rank=0)
    updates = saved_state(path)["trainer"]["done"]
    pipe = export(path, options.vae, options.out / "tokenizer", None, averaged=not options.raw)
    return pipe, {"updates": updates, "averaged": not options.raw}


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    pipe, facts = _opened(options)
    pipe.set_progress_bar_config(disable=True)
    records = spread_prompts(options.prompts)
    judge = load(options.judge)
    for scale in options.scale:
        start = time.monotonic()
        images, correct = score(pipe, records, scale, options.steps, options.seed, judge=judge)
        means = {
            tag: [
                good for record, good in zip(records, correct, strict=True) if record["tag"] == tag
            ]
            for tag in TAGS
        }
        result = {tag: round(sum(goods) / len(goods), 3) for tag, goods in means.items()}
        line = facts | {"scale": scale, "steps": options.steps} | result
        line |= {
            "mean": round(sum(result.values()) / 6, 3),
            "prompts": len(records),
            "seconds": round(time.monotonic() - start, 1),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        name = f"{facts['updates']:06d}" if "updates" in facts else facts["pipeline"]
        grid(images, records, correct).save(options.out / f"grid-{name}-{scale:g}.png")


if __name__ == "__main__":
    main()
