"""What does noise optimisation buy? Every method once on each prompt, beside random search at equal
NFE, equal seconds and equal images.

    python benchmarks/noise_opt.py [--prompts 12] [--images 30] [--methods NAME ...] [--finished]
        [--output ...]

The reward that is optimised is ``emoji-aware``; whether the image is right is said by
``emoji-judge``, a part of it, and by the audit judge, which no method sees. A run is anytime: the
best image after so much work is read from random search's own run, which goes on for longer than
the others. FIND is judged by the mean of fresh draws from its law, beside as many of normal noise.
Finished runs are kept in ``--work`` and not repeated; ``--finished`` makes the table of the prompts
that every method has.
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Estimate, Row, command_line, save, strata
from rich.progress import Progress

import diffalign as da
from diffalign.core import Candidate
from diffalign.core.search import Method
from diffalign.eval.evidence import stratified, tag_of
from diffalign.eval.statistics import interval
from diffalign.generate.verdicts import verdicts
from diffalign.noise_opt.normality import Normality
from diffalign.tasks.geneval.verdict import prompts

# a result of its own for a model of few steps
RESULTS = {"emoji-turbo": "noise_opt_turbo"}
FRESH = 50
FRESH_WAYS = ("find", "find, tuned", "random-search")
COLUMNS = {
    "n": "prompts",
    "NFE": "mean denoiser rows of a run, the final call included",
    "backward": "mean denoiser rows of backward passes",
    "seconds": "median processor seconds of a run",
    "reward": "of the result, which is what is optimised",
    "gain": "difference of the reward to the first image",
    "judge": "share of prompts whose result is right, by emoji-judge",
    "audit": "share of prompts whose result is right, by the audit judge",
    "audit gain": "difference of the audit judge's share to the first image",
    "norm": "mean norm of the result's noise over that of normal noise",
    "normal": "share of results whose noise passes DNO's test",
    "to random, NFE": "difference of the reward to random search at equal NFE",
    "to random, seconds": "difference of the reward to random search at equal seconds",
    "to random, images": "difference of the reward to random search at equal images",
    "audit to random": "difference of the audit judge's share at equal seconds",
    "audit to ReNO": "difference of the audit judge's share of results to ReNO's",
    "fresh": "mean reward of 50 fresh draws, of FIND's law or of normal noise",
    "fresh to normal": "difference of that to normal noise",
    "chance": "probability of as high a difference if the sign of each prompt's were a coin's",
}


# of emoji-aware, each of which costs CARINOX a backward pass of its own
PARTS = 4


def equal_starts(images: int) -> int:
    """Starts of CARINOX, one update each, that need the backward passes of ReNO."""
    return max(round((images - 1) / PARTS), 1)


def ways(images: int) -> dict[str, Callable[[], Method[Any]]]:
    """The methods at so many images; random search has four times as many, for the slow ones."""
    return {
        "random-search": lambda: da.RandomSearch(noises=4 * images),
        "reno": lambda: da.ReNO(iterations=images),
        # of .6, 1.25 (the usual one), 2.5 and 5 the best on 18 tuning prompts of emoji-turbo
        "reno, rate 5": lambda: da.ReNO(iterations=images, rate=5.0),
        "reno, skip": lambda: da.ReNO(iterations=images, gradient="skip"),
        "reno, DNO": lambda: da.ReNO(iterations=images, normality=0.1),
        "reno, free": lambda: da.ReNO(iterations=images, clip=None, regulariser=0.0),
        "carinox": lambda: da.CARINOX(starts=3, iterations=max(images // 3, 1)),
        # as many backward passes as ReNO; starts, iterations and rate are the best of eight choices
        # on those prompts
        "carinox, VJPs": lambda: da.CARINOX(starts=equal_starts(images), iterations=2, rate=5.0),
        "find": lambda: da.FIND(iterations=images, batch=4, rate=4e-3, draws=4),
        # the best of ten choices there
        "find, tuned": lambda: da.FIND(iterations=images, batch=8, rate=0.05, draws=4),
    }


def run(name: str, pipe: Any, prompt_id: int, options: Namespace) -> dict[str, Any]:
    """One run as data: what the best image was after how much work."""
    record, prompt = prompts()[prompt_id], str(prompts()[prompt_id]["prompt"])
    call = {"num_inference_steps": options.steps, "guidance_scale": options.scale}
    reward = da.rewards.load("emoji-aware")
    pictures: list[torch.Tensor] = []
    times: list[float] = []
    start = time.process_time()

    def improved(candidate: Candidate) -> None:
        pictures.append(candidate.image)
        times.append(time.process_time() - start)

    method = ways(options.images)[name]()
    result = da.align(pipe, prompt, method=method, reward=reward, improved=improved, **call)
    total = time.process_time() - start
    stack = torch.stack(pictures)
    right = {
        key: verdicts(da.load(judge), stack, [record] * len(stack))
        for key, judge in (("judge", "emoji-judge"), ("audit", "emoji-judge-audit"))
    }
    rows = options.steps * (2 if options.scale > 1 else 1)
    points = [
        {
            "nfe": moment.nfe,
            "images": moment.nfe // rows,
            "seconds": seconds,
            "reward": moment.score,
            **{key: bool(answers[i] and answers[i].correct) for key, answers in right.items()},
        }
        for i, (moment, seconds) in enumerate(zip(result.history, times, strict=True))
    ]
    noise = result.noise
    return {
        "prompt_id": prompt_id,
        "points": points,
        "nfe": result.ledger.nfe,
        "backward": result.ledger.backward,
        "images": result.scored,
        "seconds": total,
        "norm": None if noise is None else float(noise.norm()) / noise.numel() ** 0.5,
        "normal": None if noise is None else Normality.of(noise).normal,
        "fresh": fresh(pipe, prompt, result, reward, call) if name in FRESH_WAYS else None,
    }


def fresh(pipe: Any, prompt: str, result: Any, reward: Any, call: dict[str, float]) -> float:
    """Mean reward of fresh draws from the law that was found, or from normal noise."""
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, size, size)
    law = da.NoisePolicy(torch.zeros(shape), torch.ones(shape))
    if result.findings:
        law = da.NoisePolicy.of(result.findings)
    scores = []
    for first in range(0, FRESH, 10):
        latents = law.draw(range(10**6 + first, 10**6 + first + 10))
        pictures = pipe([prompt] * 10, latents=latents, output_type="pt", **call).images
        with torch.no_grad():
            scores.append(reward(pictures, [prompt] * 10))
    return float(torch.cat(scores).mean())


def file_of(name: str, prompt_id: int, options: Namespace) -> Path:
    """Where a run is kept."""
    place = Path(options.work) / options.model / name.replace(", ", "-")
    return place / f"{prompt_id}-{options.images}-{options.steps}.json"


def turns(ids: Sequence[int]) -> list[int]:
    """Prompts in turns of their tags, so that the first ones are of every kind."""
    tags = {i: tag_of(i) for i in ids}
    places = {i: [k for k in ids if tags[k] == tags[i]].index(i) for i in ids}
    return sorted(ids, key=lambda i: (places[i], i))


def run_all(ids: Sequence[int], options: Namespace, bar: Progress) -> None:
    """Run what is not finished, all methods of a prompt before the next prompt."""
    pipe = da.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    task = bar.add_task(options.model, total=len(ids))
    for prompt_id in ids:
        for name in options.methods:
            file = file_of(name, prompt_id, options)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(f".{os.getpid()}.part")
                part.write_text(json.dumps(run(name, pipe, prompt_id, options)))
                part.replace(file)
        bar.advance(task)


def at(record: dict[str, Any], key: str, limit: float) -> dict[str, Any]:
    """The best image of a run when ``key`` had come to ``limit``; the first one before."""
    reached = [point for point in record["points"] if point[key] <= limit]
    return dict(reached[-1] if reached else record["points"][0])


def row_of(
    name: str, records: list[Any], base: list[Any], reno: list[Any] | None, ids: Sequence[int]
) -> Row:
    """The table's row of one way, beside random search (``base``) and ReNO."""
    tags = strata(ids)

    def mean(values: Sequence[float]) -> Estimate:
        return Estimate.of(interval(values, tags))

    ends = [(record["points"][0], record["points"][-1]) for record in records]

    def gain(key: str, column: str) -> Estimate:
        pairs = zip(ends, records, base, strict=True)
        return mean(
            [float(p[column]) - float(at(b, key, r[key])[column]) for (_, p), r, b in pairs]
        )

    def share(key: str) -> float | None:
        values = [float(record[key]) for record in records if record[key] is not None]
        return sum(values) / len(values) if values else None

    draws = [record["fresh"] for record in records if record["fresh"] is not None]
    to_normal = [a - b["fresh"] for a, b in zip(draws, base)] if records is not base else []
    theirs = [] if reno is None else [float(record["points"][-1]["audit"]) for record in reno]
    return {
        "method": name,
        "n": len(ids),
        "NFE": share("nfe"),
        "backward": share("backward"),
        "seconds": float(np.median([record["seconds"] for record in records])),
        "reward": mean([end["reward"] for _, end in ends]),
        "gain": mean([end["reward"] - first["reward"] for first, end in ends]),
        "judge": mean([float(end["judge"]) for _, end in ends]),
        "audit": mean([float(end["audit"]) for _, end in ends]),
        "audit gain": mean([float(end["audit"]) - float(first["audit"]) for first, end in ends]),
        "norm": share("norm"),
        "normal": share("normal"),
        "to random, NFE": gain("nfe", "reward"),
        "to random, seconds": gain("seconds", "reward"),
        "to random, images": gain("images", "reward"),
        "audit to random": gain("seconds", "audit"),
        "audit to ReNO": mean([float(end["audit"]) - x for (_, end), x in zip(ends, theirs)])
        if theirs
        else None,
        "fresh": mean(draws) if draws else None,
        "fresh to normal": mean(to_normal) if to_normal else None,
        "chance": chance(to_normal) if to_normal else None,
    }


def chance(differences: Sequence[float], flips: int = 20_000) -> float:
    """Probability of a mean difference as high as this one if the sign of each were a coin's."""
    values, rng = np.asarray(differences), np.random.default_rng(0)
    signs = rng.choice((-1.0, 1.0), size=(flips, len(values)))
    return float((1 + ((signs * values).mean(1) >= values.mean()).sum()) / (1 + flips))


def table(ids: Sequence[int], options: Namespace) -> list[Row]:
    """The rows of the prompts that every way has finished."""
    files = {n: {i: file_of(n, i, options) for i in ids} for n in options.methods}
    ids = [i for i in ids if all(files[name][i].exists() for name in options.methods)]
    if not ids:
        return []
    records = {n: [json.loads(files[n][i].read_text()) for i in ids] for n in options.methods}
    base, reno = records["random-search"], records.get("reno")
    return [row_of(name, runs, base, reno, ids) for name, runs in records.items()]


def main() -> None:
    parser = command_line(
        __doc__, prompts=12, images=30, steps=10, scale=3.0, model="emoji", work="build/noise_opt"
    )
    parser.add_argument("--methods", nargs="*", default=list(ways(1)), choices=list(ways(1)))
    parser.add_argument("--finished", action="store_true", help="run nothing")
    options = parser.parse_args()
    if "random-search" not in options.methods:
        parser.error("--methods must contain random-search: the others are compared with it")
    torch.set_num_threads(1)
    ids = turns(stratified(options.prompts))
    if not options.finished:
        with Progress() as bar:
            run_all(ids, options, bar)
    rows = table(ids, options)
    if not rows:
        parser.error("--finished: no prompt has a run of every method")
    save(RESULTS.get(options.model, "noise_opt"), rows, options, COLUMNS)


if __name__ == "__main__":
    main()
