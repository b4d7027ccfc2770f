"""What is lost where time is saved? Called by pruning.py with --model.

Every way runs on the same prompts and seeds. PSNR, SSIM and the distance of emoji-clip's image
features say how far an image is from that of the full run with the same noise; the judge says
whether it is right. Seconds are processor seconds of one thread for an image, in calls of six
prompts, decoder and text included, the median of the calls; the ways take turns, so that other load
meets all of them. Beside each way stands what fewer steps give in the same seconds, on a straight
line between two numbers of steps; above the largest of these, what that gives. Images are kept in
``--work`` and not made again.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import UNITS, Estimate, Row, save
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from diffalign.core.technique import Technique
from diffalign.core.types import Json
from diffalign.embedded.load import MODELS, load, reward_of
from diffalign.eval.evidence import (
    Config,
    Measured,
    compare,
    seed_of,
    stratified,
    tag_of,
)
from diffalign.eval.statistics import interval
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job
from diffalign.tasks.geneval.verdict import prompts, verdict

SHARES = (0.35, 0.5, 0.6, 0.7, 0.85)
"""Of the steps of a full run, for the curve of fewer steps."""
GROUP = 6
"""Prompts of a call, one of each tag."""
LARGEST = 60.0
"""PSNR of equal images in 8 bits, which have none."""
COLUMNS = {
    "steps": "of the full run",
    "seconds": UNITS["seconds"],
    "TFLOP": "operations of the first image, text and denoiser",
    "PSNR": f"decibels to the full run, at most {LARGEST:g}",
    "PSNR vs fewer steps": "difference to fewer steps in equal seconds",
    "SSIM": "structural similarity to the full run, 1 for equal images",
    "distance": "1 - cosine of emoji-clip's image features to those of the full run",
    "judge": UNITS["score"],
    "judge vs fewer steps": "difference to fewer steps in equal seconds",
    "judge vs full": "difference to the full run",
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way of saving time."""

    # the curve to which it belongs
    group: str
    name: str
    steps: int
    techniques: tuple[Technique, ...] = ()
    # threshold of cache-dit, None without it
    threshold: float | None = None


def ways(steps: int) -> Iterator[Way]:
    """All that are compared with a full run of so many steps; the full run comes first."""
    yield Way("full", f"{steps} steps", steps)
    for count in sorted({round(share * steps) for share in SHARES}):
        yield Way("fewer steps", f"{count} steps", count)
    for keep in (0.3, 0.5, 0.7):
        yield Way("CAT", f"CAT {keep:g}", steps, (da.CAT(keep),))
    for keep in (0.3, 0.5):
        turns = da.CAT(keep, selection="round-robin")
        yield Way("round-robin", f"round-robin {keep:g}", steps, (turns,))
    for selection in ("random", "movement", "ras"):
        technique = da.CAT(0.3, selection=selection)
        yield Way("other choices", f"{selection} 0.3", steps, (technique,))
    for threshold in (0.1, 0.2, 0.4):
        yield Way("cache-dit", f"cache-dit {threshold:g}", steps, (), threshold)
    adaptive = da.AdaptiveGuidance()
    yield Way("AdaptiveGuidance", "AdaptiveGuidance", steps, (adaptive,))
    for keep in (0.3, 0.5):
        both = (adaptive, da.CAT(keep))
        yield Way("AdaptiveGuidance", f"AdaptiveGuidance + CAT {keep:g}", steps, both)
    yield Way("AdaptiveGuidance", "AdaptiveGuidance + cache-dit 0.2", steps, (adaptive,), 0.2)


@contextmanager
def cached(pipe: Any, threshold: float) -> Iterator[None]:
    """cache-dit on the pipeline."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it describes every context it makes
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def in_place(pipe: Any, way: Way) -> Any:
    """What must be on around a run, besides techniques."""
    return nullcontext() if way.threshold is None else cached(pipe, way.threshold)


def in_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8 bits."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Decibels [B] between 8-bit images [B, 3, H, W]."""
    error = ((images.double() - truth.double()) / 255).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp_max(LARGEST)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity [B] of 8-bit images (Wang et al. 2004, doi:10.1109/TIP.2003.819861):
    windows of 11 x 11 with a deviation of 1.5 inside the image, mean over channels."""
    x, y = (part.double() / 255 for part in (images, truth))
    weights = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    window = torch.outer(weights, weights) / weights.sum() ** 2
    kernel = window.expand(x.shape[1], 1, 11, 11)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, groups=x.shape[1])

    a, b = mean(x), mean(y)
    spread_x, spread_y, shared = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    alike = (2 * a * b + 1e-4) * (2 * shared + 9e-4)
    return (alike / ((a * a + b * b + 1e-4) * (spread_x + spread_y + 9e-4))).mean((1, 2, 3))


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of one call."""

    # 8 bits [B, 3, H, W]: each prompt's, one after the other
    images: Tensor
    # of one image
    seconds: float


def jobs_of(ids: Sequence[int], count: int) -> list[Job]:
    """``count`` images of each prompt."""
    return [Job(_text(n), seed_of(n, k), f"{n}-{k}") for n in ids for k in range(count)]


def generated(pipe: Any, way: Way, steps: int, ids: Sequence[int], options: Namespace) -> Batch:
    """The images of some prompts in one call; they are made once and kept."""
    setting = f"{way} {ids} x {options.samples} at scale {options.scale}"
    name = f"{steps}-{way.name.replace(' ', '-')}"
    path = Path(options.work) / name / f"{'-'.join(map(str, ids))}.pt"
    if path.exists():
        entry = torch.load(path)
        if entry["setting"] != setting:
            raise SystemExit(
                f"{path} holds {entry['setting']}; this is {setting}. Give another --work."
            )
        return Batch(entry["images"], entry["seconds"])
    jobs = jobs_of(ids, options.samples)
    call = {"num_inference_steps": way.steps, "guidance_scale": options.scale}
    began = time.process_time()
    with in_place(pipe, way):
        batch = next(samples(pipe, way.techniques, jobs, batch=len(jobs), call=call))
    seconds = (time.process_time() - began) / len(jobs)
    images = in_bytes(torch.stack([sample.image for sample in batch]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"setting": setting, "images": images, "seconds": seconds}, part)
    os.replace(part, path)
    return Batch(images, seconds)


@dataclass(frozen=True, slots=True)
class Judges:
    """What looks at images."""

    # detector of objects
    judge: Any
    # images in [0, 1] -> features of norm 1
    features: Callable[[Tensor], Tensor]

    def records(self, batch: Batch, truth: Batch, ids: Sequence[int], count: int) -> Iterator[Json]:
        """One record for each image of a call beside the full run's."""
        ours, true = (self.features(x.float() / 255) for x in (batch.images, truth.images))
        columns = {
            "PSNR": psnr(batch.images, truth.images),
            "SSIM": ssim(batch.images, truth.images),
            "distance": (1 - (ours * true).sum(-1)).clamp_min(0),
        }
        figures = {name: values.tolist() for name, values in columns.items()}
        detections = self.judge.detect(batch.images.float() / 255)
        for row, (n, k) in enumerate((n, k) for n in ids for k in range(count)):
            result = verdict(prompts()[n], detections[row], self.judge.thresholds)
            yield {
                "prompt_id": n,
                "sample": k,
                "seed": seed_of(n, k),
                "correct": result.correct,
                "seconds": batch.seconds,
                **{name: values[row] for name, values in figures.items()},
            }


def _text(prompt_id: int) -> str:
    return str(prompts()[prompt_id]["prompt"])


def operations(pipe: Any, way: Way, prompt_id: int, options: Namespace) -> float:
    """Floating point operations of one image before its decoding, counted once and kept."""
    path = Path(options.work) / "operations.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    key = f"{way} of {prompt_id} at scale {options.scale}"
    if key not in known:
        job = Job(_text(prompt_id), seed_of(prompt_id, 0), "")
        call = {
            "num_inference_steps": way.steps,
            "guidance_scale": options.scale,
            "output_type": "latent",
        }
        counter = FlopCounterMode(display=False)
        # the form of attention whose products the counter sees on a CPU
        with in_place(pipe, way), sdpa_kernel(SDPBackend.MATH), counter:
            next(samples(pipe, way.techniques, [job], batch=1, call=call))
        known[key] = float(counter.get_total_flops())
        path.write_text(json.dumps(known, indent=0))
    return known[key]


def seconds_of(run: Measured) -> float:
    """Of the median image."""
    return statistics.median(record["seconds"] for record in run.records)


def in_equal_seconds(runs: Sequence[Measured], seconds: float, key: str) -> dict[int, float]:
    """Prompt -> the figure that fewer steps give in so many seconds, on straight lines; at the ends
    that of the end."""
    order = sorted(runs, key=lambda run: seconds_of(run))
    times = [seconds_of(run) for run in order]
    values = [run.per_prompt(key) for run in order]
    if seconds <= times[0] or len(order) == 1:
        return values[0]
    if seconds >= times[-1]:
        return values[-1]
    i = next(i for i, time in enumerate(times) if time >= seconds)
    part = (seconds - times[i - 1]) / (times[i] - times[i - 1])
    return {n: (1 - part) * values[i - 1][n] + part * values[i][n] for n in values[i]}


def difference(run: Measured, others: Mapping[int, float], key: str) -> Estimate:
    """Paired by prompt."""
    ours = run.per_prompt(key)
    return Estimate.of(interval([ours[n] - others[n] for n in ours], [tag_of(n) for n in ours]))


def mean(run: Measured, key: str) -> Estimate:
    values = run.per_prompt(key)
    return Estimate.of(interval(list(values.values()), [tag_of(n) for n in values]))


def rows_of(steps: int, runs: Mapping[Way, Measured], work: Mapping[Way, float]) -> list[Row]:
    """The lines of one table."""
    curve = [run for way, run in runs.items() if way.group == "fewer steps"]
    full = next(run for way, run in runs.items() if way.group == "full")
    rows: list[Row] = []
    for way, run in runs.items():
        seconds = seconds_of(run)
        row: Row = {
            "method": way.name,
            "group": way.group,
            "steps": steps,
            "seconds": seconds,
            "TFLOP": work[way] / 1e12,
        }
        row |= {key: mean(run, key) for key in ("PSNR", "SSIM", "distance")}
        row["judge"] = Estimate.of(run.score())
        if way.group != "full":
            row["judge vs full"] = Estimate.of(compare(run, full))
        if way.group not in ("full", "fewer steps"):
            for name, key in (("PSNR", "PSNR"), ("judge", "correct")):
                others = in_equal_seconds(curve, seconds, key)
                row[f"{name} vs fewer steps"] = difference(run, others, key)
        rows.append(row)
    return rows


def groups(count: int) -> Iterator[list[int]]:
    """``stratified(count)`` in parts of one prompt of each tag, so that all ways can run in turns
    and a study that is stopped has the same prompts of each."""
    before: set[int] = set()
    for size in [*range(GROUP, count, GROUP), count]:
        ids = stratified(size)
        yield [n for n in ids if n not in before]
        before.update(ids)


def study(options: Namespace) -> None:
    """Run every way, measure and save."""
    torch.set_num_threads(1)
    entry = MODELS[options.model]
    pipe, clip = load(options.model), da.rewards.load(reward_of(options.model))
    judges = Judges(load(entry.judge), clip.image_features)
    options.scale = entry.defaults["scale"] if options.scale is None else options.scale
    options.work = str(Path(options.work) / options.model)
    runs: dict[tuple[int, Way], list[Json]] = {
        (steps, way): [] for steps in options.steps for way in ways(steps)
    }
    work: dict[tuple[int, Way], float] = {}
    with torch.no_grad(), Progress() as bar:
        task = bar.add_task("images", total=len(runs) * options.prompts * options.samples)
        for ids in groups(options.prompts):
            truth: dict[int, Batch] = {}
            for (steps, way), records in runs.items():
                batch = generated(pipe, way, steps, ids, options)
                full = truth.setdefault(steps, batch)  # the first way
                records += judges.records(batch, full, ids, options.samples)
                if (steps, way) not in work:
                    work[steps, way] = operations(pipe, way, ids[0], options)
                bar.advance(task, len(batch.images))
    rows: list[Row] = []
    for steps in options.steps:
        finished = {
            way: Measured(
                Config(way.name, way.techniques, options.scale, way.steps), tuple(records)
            )
            for (count, way), records in runs.items()
            if count == steps
        }
        rows += rows_of(steps, finished, {way: work[steps, way] for way in finished})
    units = COLUMNS | {"group": "curve of the plot"}
    facts = {"prompts": options.prompts, "samples": options.samples}
    save("pruning_quality", rows, options, units, facts)
