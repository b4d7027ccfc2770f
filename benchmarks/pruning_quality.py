"""What is lost where time is saved? Called by pruning.py with --model.

Every way runs on the same prompts and seeds. PSNR, SSIM and the distance of emoji-clip's image
features say how far an image is from that of the full run with the same noise; the judge says
whether it is right. Seconds are processor seconds of one thread, per image, decoder and text
included. Beside each way stands what fewer steps give in the same seconds, on a straight line
between two numbers of steps; above the largest of these, what that gives. Images and figures are
kept in ``--work`` and not made again.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
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
from diffalign.embedded.load import MODELS, load
from diffalign.eval.evidence import (
    Config,
    Measured,
    compare,
    measure,
    seed_of,
    stratified,
    tag_of,
)
from diffalign.eval.statistics import interval
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job
from diffalign.tasks.geneval.verdict import prompts

SHARES = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
"""Of the steps of a full run, for the curve of fewer steps."""
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


class Beside:
    """Images beside those of the full run: scorers of ``measure``."""

    def __init__(self, truth: Mapping[str, Tensor], features: Callable[[Tensor], Tensor]) -> None:
        """``truth``: prompt -> 8-bit images [samples, 3, H, W]."""
        self.truth, self.features = truth, features

    def scorers(self) -> dict[str, Callable[[Tensor, Sequence[str]], Tensor]]:
        """By the name of their figure."""
        return {"PSNR": self.psnr, "SSIM": self.ssim, "distance": self.distance}

    def of(self, texts: Sequence[str]) -> Tensor:
        """The full run's images; a prompt's samples stand in their order."""
        counts: Counter[str] = Counter()
        rows = []
        for text in texts:
            rows.append(self.truth[text][counts[text]])
            counts[text] += 1
        return torch.stack(rows)

    def psnr(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return psnr(in_bytes(images), self.of(texts))

    def ssim(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return ssim(in_bytes(images), self.of(texts))

    def distance(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        ours, true = (self.features(x.float() / 255) for x in (in_bytes(images), self.of(texts)))
        return (1 - (ours * true).sum(-1)).clamp_min(0)


def full_run(
    pipe: Any, ids: Sequence[int], steps: int, options: Namespace, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Prompt -> 8-bit images of the full run, made once and kept."""
    path = Path(options.work) / f"full-{steps}.pt"
    truth: dict[str, Tensor] = torch.load(path) if path.exists() else {}
    missing = [n for n in ids if len(truth.get(_text(n), ())) < options.samples]
    jobs = [Job(_text(n), seed_of(n, k), "") for n in missing for k in range(options.samples)]
    call = {"num_inference_steps": steps, "guidance_scale": options.scale}
    for batch in samples(pipe, (), jobs, batch=options.batch, call=call, copies=options.samples):
        for first in range(0, len(batch), options.samples):
            group = batch[first : first + options.samples]
            images = torch.stack([sample.image for sample in group])
            truth[group[0].job.prompt] = in_bytes(images)
        part = path.with_suffix(".part")
        torch.save(truth, part)
        os.replace(part, path)
        advance(len(batch))
    return truth


def _text(prompt_id: int) -> str:
    return str(prompts()[prompt_id]["prompt"])


def operations(pipe: Any, way: Way, prompt_id: int, scale: float) -> float:
    """Floating point operations of one image before its decoding."""
    job = Job(_text(prompt_id), seed_of(prompt_id, 0), "")
    call = {"num_inference_steps": way.steps, "guidance_scale": scale, "output_type": "latent"}
    counter = FlopCounterMode(display=False)
    # the form of attention whose products the counter sees on a CPU
    with in_place(pipe, way), sdpa_kernel(SDPBackend.MATH), counter:
        next(samples(pipe, way.techniques, [job], batch=1, call=call))
    return float(counter.get_total_flops())


def in_equal_seconds(runs: Sequence[Measured], seconds: float, key: str) -> dict[int, float]:
    """Prompt -> the figure that fewer steps give in so many seconds, on straight lines; at the ends
    that of the end."""
    order = sorted(runs, key=lambda run: run.mean("seconds"))
    times = [run.mean("seconds") for run in order]
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
        seconds = run.mean("seconds")
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


def study(options: Namespace) -> None:
    """Run every way, measure and save."""
    torch.set_num_threads(1)
    entry = MODELS[options.model]
    pipe, judge, clip = load(options.model), load(entry.judge), da.rewards.load("emoji-clip")
    options.scale = options.scale or entry.defaults["scale"]
    options.work = str(Path(options.work) / options.model)
    options.batch = 16 // options.samples * options.samples
    Path(options.work).mkdir(parents=True, exist_ok=True)
    ids = stratified(options.prompts)
    if len({_text(n) for n in ids}) < len(ids):
        raise SystemExit("Two of the prompts are the same text; their images cannot be told apart.")
    rows: list[Row] = []
    with Progress() as bar, torch.no_grad():
        for steps in options.steps:
            task = bar.add_task(f"full run, {steps} steps", total=len(ids) * options.samples)
            truth = full_run(pipe, ids, steps, options, lambda n, t=task: bar.advance(t, n))
            beside = Beside(truth, clip.image_features)
            runs: dict[Way, Measured] = {}
            work: dict[Way, float] = {}
            for way in ways(steps):
                runs[way] = measured(pipe, judge, way, steps, ids, beside, options, bar)
                work[way] = operations(pipe, way, ids[0], options.scale)
            rows += rows_of(steps, runs, work)
    units = COLUMNS | {"group": "curve of the plot"}
    facts = {"prompts": len(ids), "samples": options.samples}
    save("pruning_quality", rows, options, units, facts)


def measured(
    pipe: Any,
    judge: Any,
    way: Way,
    steps: int,
    ids: Sequence[int],
    beside: Beside,
    options: Namespace,
    bar: Progress,
) -> Measured:
    """Images of one way, judged and compared; finished prompts are read."""
    total = len(ids) * options.samples
    task = bar.add_task(f"{steps}: {way.name}", total=total)
    folder = Path(options.work) / f"{steps}-{way.name.replace(' ', '-')}"
    config = Config(way.name, way.techniques, scale=options.scale, steps=way.steps)
    with in_place(pipe, way):
        run = measure(
            pipe,
            judge,
            config,
            folder,
            prompt_ids=ids,
            samples=options.samples,
            batch=options.batch,
            scorers=beside.scorers(),
            progress=lambda count: bar.advance(task, count),
        )
    bar.update(task, completed=total)
    return run
