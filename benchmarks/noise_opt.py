"""What does noise optimisation buy? Every method once on each prompt, beside random search at equal
NFE, equal seconds and equal images.

    python benchmarks/noise_opt.py [--prompts 12] [--images 30] [--methods NAME ...] [--output ...]

The reward that is optimised is ``emoji-clip`` plus a fiftieth of ``emoji-judge``, in two parts for
CARINOX; whether the image is right is said by the audit judge, which no method sees. A run is
anytime: the best image after so much work is read from random search's own run, which goes on for
longer than the others. FIND is judged by the mean of fresh draws from its law, beside as many of
normal noise. Finished runs are kept in ``--work`` and not repeated.
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from results import Estimate, Row, command_line, save
from rich.progress import Progress

import diffalign as da
from diffalign.core import Candidate
from diffalign.core.search import Method
from diffalign.eval.evidence import stratified, tag_of
from diffalign.eval.statistics import interval
from diffalign.generate.verdicts import verdicts
from diffalign.noise_opt.normality import Normality
from diffalign.tasks.geneval.verdict import prompts

FRESH = 50
COLUMNS = {
    "NFE": "mean denoiser rows of a run, the final call included",
    "backward": "mean denoiser rows of backward passes",
    "seconds": "median processor seconds of a run",
    "reward": "of the result, which is what is optimised",
    "audit": "share of prompts whose result is right, by the audit judge",
    "gain": "difference of the reward to the first image",
    "normal": "share of results whose noise passes DNO's test",
    "to random, NFE": "difference of the reward to random search at equal NFE",
    "to random, seconds": "difference of the reward to random search at equal seconds",
    "to random, images": "difference of the reward to random search at equal images",
    "audit to random": "difference of the audit judge's share at equal seconds",
    "fresh": "mean reward of 50 fresh draws, of FIND's law or of normal noise",
}


def ways(images: int) -> dict[str, Callable[[], Method[Any]]]:
    """The methods at so many images; random search has three times as many, for the slow ones."""
    return {
        "random-search": lambda: da.RandomSearch(noises=4 * images),
        "reno": lambda: da.ReNO(iterations=images),
        "reno, skip": lambda: da.ReNO(iterations=images, gradient="skip"),
        "reno, DNO": lambda: da.ReNO(iterations=images, normality=0.1),
        "reno, free": lambda: da.ReNO(iterations=images, clip=None, regulariser=0.0),
        "carinox": lambda: da.CARINOX(starts=3, iterations=max(images // 3, 1)),
        "find": lambda: da.FIND(iterations=images, batch=4, rate=4e-3, draws=4),
    }


def reward_of() -> da.rewards.Weighted:
    """What is optimised."""
    return da.rewards.Weighted({"emoji-clip": 1.0, "emoji-judge": 0.02})


def run(name: str, pipe: Any, prompt_id: int, options: Namespace) -> dict[str, Any]:
    """One run as data: what the best image was after how much work."""
    record, prompt = prompts()[prompt_id], str(prompts()[prompt_id]["prompt"])
    images: list[torch.Tensor] = []
    times: list[float] = []
    start = time.process_time()

    def improved(candidate: Candidate) -> None:
        images.append(candidate.image)
        times.append(time.process_time() - start)

    call = {"num_inference_steps": options.steps, "guidance_scale": options.scale}
    method = ways(options.images)[name]()
    result = da.align(pipe, prompt, method=method, reward=reward_of(), improved=improved, **call)
    total = time.process_time() - start
    seen = torch.stack(images)
    audit = verdicts(da.load("emoji-judge-audit"), seen, [record] * len(seen))
    price = 2 * options.steps
    points = [
        {
            "nfe": moment.nfe,
            "images": moment.nfe // price,
            "seconds": seconds,
            "reward": moment.score,
            "audit": verdict is not None and verdict.correct,
        }
        for moment, seconds, verdict in zip(result.history, times, audit, strict=True)
    ]
    noise = result.noise
    return {
        "prompt_id": prompt_id,
        "points": points,
        "nfe": result.ledger.nfe,
        "backward": result.ledger.backward,
        "images": result.scored,
        "seconds": total,
        "normal": None if noise is None else Normality.of(noise).normal,
        "fresh": fresh(pipe, prompt, result, call) if name in ("find", "random-search") else None,
    }


def fresh(pipe: Any, prompt: str, result: Any, call: dict[str, Any]) -> float:
    """Mean reward of fresh draws from the law that was found, or from normal noise."""
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, size, size)
    law = da.NoisePolicy(torch.zeros(shape), torch.ones(shape))
    if result.findings:
        law = da.NoisePolicy.of(result.findings)
    reward, scores = reward_of(), []
    for first in range(0, FRESH, 10):
        seeds = range(10**6 + first, 10**6 + first + 10)
        latents = law.draw(seeds)
        pictures = pipe([prompt] * 10, latents=latents, output_type="pt", **call).images
        scores.append(reward(pictures, [prompt] * 10))
    return float(torch.cat(scores).mean())


def runs(name: str, pipe: Any, ids: Sequence[int], options: Namespace, bar: Progress) -> list[Any]:
    """The runs of one way on all prompts, those that are finished read from their files."""
    place = Path(options.work) / name.replace(", ", "-")
    place.mkdir(parents=True, exist_ok=True)
    task = bar.add_task(name, total=len(ids))
    records = []
    for prompt_id in ids:
        file = place / f"{prompt_id}-{options.images}-{options.steps}.json"
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(run(name, pipe, prompt_id, options)))
            part.replace(file)
        records.append(json.loads(file.read_text()))
        bar.advance(task)
    return records


def at(record: dict[str, Any], key: str, limit: float) -> dict[str, Any]:
    """The best image of a run when ``key`` had come to ``limit``; the first one before."""
    reached = [point for point in record["points"] if point[key] <= limit]
    return dict(reached[-1] if reached else record["points"][0])


def row_of(name: str, records: list[Any], base: list[Any], ids: Sequence[int]) -> Row:
    """The table's row of one way."""
    tags = [tag_of(prompt_id) for prompt_id in ids]

    def mean(values: Sequence[float]) -> Estimate:
        return Estimate.of(interval(values, tags))

    last = [record["points"][-1] for record in records]

    def gain(key: str, column: str) -> Estimate:
        pairs = zip(last, records, base, strict=True)
        return mean([float(p[column]) - float(at(b, key, r[key])[column]) for p, r, b in pairs])

    seconds = sorted(record["seconds"] for record in records)
    normal = [float(record["normal"]) for record in records if record["normal"] is not None]
    draws = [record["fresh"] for record in records if record["fresh"] is not None]
    return {
        "method": name,
        "NFE": sum(record["nfe"] for record in records) / len(records),
        "backward": sum(record["backward"] for record in records) / len(records),
        "seconds": seconds[len(seconds) // 2],
        "reward": mean([point["reward"] for point in last]),
        "audit": mean([float(point["audit"]) for point in last]),
        "gain": mean([r["points"][-1]["reward"] - r["points"][0]["reward"] for r in records]),
        "normal": sum(normal) / len(normal) if normal else None,
        "to random, NFE": gain("nfe", "reward"),
        "to random, seconds": gain("seconds", "reward"),
        "to random, images": gain("images", "reward"),
        "audit to random": gain("seconds", "audit"),
        "fresh": mean(draws) if draws else None,
    }


def main() -> None:
    parser = command_line(
        __doc__, prompts=12, images=30, steps=10, scale=3.0, work="build/noise_opt"
    )
    parser.add_argument("--model", default="emoji-2")
    parser.add_argument("--methods", nargs="*", default=list(ways(1)), choices=list(ways(1)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = stratified(options.prompts)
    pipe = da.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    with Progress() as bar:
        base = runs("random-search", pipe, ids, options, bar)
        rows = []
        for name in options.methods:
            rows.append(row_of(name, runs(name, pipe, ids, options, bar), base, ids))
    save("noise_opt", rows, options, COLUMNS, {"prompts": len(ids)})


if __name__ == "__main__":
    main()
