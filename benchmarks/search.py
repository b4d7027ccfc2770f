"""What does a search buy? Every method once on each prompt, beside best-of-N at equal NFE and at
equal seconds.

    python benchmarks/search.py [--prompts 60] [--nfe 800] [--methods NAME ...] [--output ...]

A run is anytime: the image that it would have returned after 100, 200, ... NFE is read from one
run. Best-of-N runs on to twice the NFE of the others, so that a method that needs half as many
shows. The reward that is optimised is ``emoji-clip``; whether the image is right is said by the
judge and by the audit judge, which no method sees; ``emoji-clip`` learnt from verdicts of the audit
judge on other prompts, never from the judge. Finished runs are kept in ``--work`` and not repeated.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import Estimate, Row, command_line, save
from rich.progress import Progress

import diffalign as da
from diffalign.core import Candidate
from diffalign.core.technique import Technique
from diffalign.eval.evidence import stratified, tag_of
from diffalign.eval.statistics import interval
from diffalign.generate.verdicts import verdicts
from diffalign.tasks.geneval.verdict import prompts

STEPS = 20
READ = (100, 200, 400, 800, 1600)
ETA = {"kernel": da.Eta(1.0)}
BASE = "best-of-n"
JUDGES = ("emoji-judge", "emoji-judge-audit")
COLUMNS = {
    "NFE": "denoiser rows, the final call not counted",
    "prompts": "on which the method was run; differences to best-of-N are on these",
    "seconds": "median processor seconds of a run up to there",
    "reward": "emoji-clip of the best image, which is what is optimised",
    "judge": "share of prompts whose best image is right",
    "audit": "the same by the judge that shares nothing with the first",
    "to best-of-N": "difference of the reward to best-of-N at equal NFE",
    "audit to best-of-N": "difference of the audit judge's share to best-of-N at equal NFE",
    "at equal seconds": "difference of the reward to best-of-N at equal seconds",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A method with the call that it is run in."""

    method: str
    call: dict[str, Any] = field(default_factory=dict)
    techniques: tuple[Technique, ...] = ()


WAYS = {
    BASE: Way("best-of-n"),
    "best-of-n, adaptive guidance": Way("best-of-n", {}, (da.AdaptiveGuidance(),)),
    "zero-order": Way("zero-order"),
    "draft-commit, 8 steps": Way("draft-commit:steps=8"),
    "beam, svdd": Way("beam:preset=svdd", ETA),
    "beam, code": Way("beam:preset=code", ETA),
    "rbf, batch 4": Way("rbf:batch=4", ETA),
    "smc, max": Way("smc:potential=max,tilt=10", ETA),
    "dts, small": Way("dts:preset=small", ETA),
    "dts-star, small": Way("dts-star:preset=small", ETA),
    "dts-star, paper": Way("dts-star:preset=paper", ETA),
    "prompt-search": Way("prompt-search"),
}


class Timed:
    """A reward with the processor seconds that it took."""

    name, differentiable = "emoji-clip", True

    def __init__(self) -> None:
        self.reward = da.rewards.load(self.name)
        self.seconds = 0.0
        # what it was shown
        self.images: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        start = time.process_time()
        scores = self.reward(images, prompts)
        self.seconds += time.process_time() - start
        self.images += list(images.detach())
        return scores


@contextmanager
def timed(module: torch.nn.Module, name: str) -> Iterator[list[float]]:
    """Processor seconds in a method of a module's class, as a list of one number."""
    spent, cls = [0.0], type(module)
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - start

    setattr(cls, name, call)
    try:
        yield spent
    finally:
        setattr(cls, name, method)


def run(way: Way, pipe: Any, prompt_id: int, nfe: int, scale: float) -> dict[str, Any]:
    """One run as data: what the best image was after how much work."""
    record, reward = prompts()[prompt_id], Timed()
    images: list[torch.Tensor] = []
    times: list[float] = []
    start = time.process_time()

    def improved(candidate: Candidate) -> None:
        images.append(candidate.image)
        times.append(time.process_time() - start)

    with timed(pipe.unet, "forward") as network, timed(pipe.vae, "decode") as decoder:
        result = da.align(
            pipe,
            str(record["prompt"]),
            method=way.method,
            reward=reward,
            budget=da.Budget(nfe=nfe + 2 * STEPS),
            techniques=way.techniques,
            batch=8,
            improved=improved,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            **way.call,
        )
    total = time.process_time() - start
    own = total - network[0] - decoder[0] - reward.seconds
    right = [correct(images, record, judge) for judge in JUDGES]
    points = [
        {"nfe": m.nfe, "seconds": t, "reward": m.score, "judge": a, "audit": b}
        for m, t, a, b in zip(result.history, times, *right, strict=True)
    ]
    return {
        "prompt_id": prompt_id,
        "points": points,
        "nfe": result.ledger.nfe,
        "seconds": total,
        "own": own / total,
        "parts": {"denoiser": network[0], "decoder": decoder[0], "reward": reward.seconds},
        "images per call": result.ledger.evaluations / result.ledger.calls,
        "decodes": result.ledger.decodes,
        "scored": result.scored,
        "equal": result.equal,
        "all": everything(reward, record) if way is WAYS[BASE] else None,
    }


def correct(images: Sequence[torch.Tensor], record: dict[str, Any], judge: str) -> list[bool]:
    """Whether each image is right."""
    answers = verdicts(da.load(judge), torch.stack(list(images)), [record] * len(images))
    return [verdict is not None and verdict.correct for verdict in answers]


def everything(reward: Timed, record: dict[str, Any]) -> dict[str, list[Any]]:
    """Score and verdicts of every image that was finished, the grey ones before the run and the
    final call's left out."""
    images = reward.images[2:-1]
    scores = reward.reward(torch.stack(images), [str(record["prompt"])] * len(images)).tolist()
    return {"reward": scores} | {judge: correct(images, record, judge) for judge in JUDGES}


def pace(found: Sequence[Any], base: Sequence[Any]) -> dict[str, float]:
    """Seconds per NFE beside best-of-N's on the same prompt, median: with everything, without
    decoder and reward, and of the denoiser alone; and what differs."""

    def ratio(seconds: Callable[[Any], float]) -> float:
        pairs = zip(found, base, strict=True)
        return statistics.median(
            (seconds(a) / a["nfe"]) / (seconds(b) / b["nfe"]) for a, b in pairs
        )

    def undecoded(record: Any) -> float:
        return float(record["seconds"] - record["parts"]["decoder"] - record["parts"]["reward"])

    return {
        "with everything": ratio(lambda record: record["seconds"]),
        "without decoder and reward": ratio(undecoded),
        "denoiser": ratio(lambda record: record["parts"]["denoiser"]),
        "images per call": statistics.median(record["images per call"] for record in found),
        "decodes per 100 NFE": statistics.median(
            100 * record["decodes"] / record["nfe"] for record in found
        ),
    }


def limit_of(name: str, options: Namespace) -> int:
    return int(options.nfe) * (2 if name == BASE else 1)


def place_of(name: str, prompt_id: int, options: Namespace) -> Path:
    """The file of one run."""
    folder = Path(options.work) / name.replace(", ", "-").replace(" ", "-")
    return folder / f"{prompt_id}-{limit_of(name, options)}.json"


def made(name: str, ids: Sequence[int], options: Namespace) -> list[int]:
    """The prompts to show of a way: with ``--finished`` those whose run is there."""
    return [i for i in ids if not options.finished or place_of(name, i, options).exists()]


def runs(name: str, pipe: Any, ids: Sequence[int], options: Namespace, bar: Progress) -> list[Any]:
    """The runs of one way on all prompts, those that are finished read from their files."""
    task = bar.add_task(name, total=len(ids))
    nfe = limit_of(name, options)
    found = []
    for prompt_id in ids:
        file = place_of(name, prompt_id, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(run(WAYS[name], pipe, prompt_id, nfe, options.scale)))
            part.replace(file)
        found.append(json.loads(file.read_text()))
        bar.advance(task)
    return found


def way_to_the_best(base: Sequence[Any], ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """By category and judge: the share of right images, that of images chosen by the reward, and
    that of prompts with a right image among the same ones."""
    table: dict[str, dict[str, float]] = {}
    for judge in JUDGES:
        for tag in ("all", *dict.fromkeys(map(tag_of, ids))):
            rows = [r["all"] for r, i in zip(base, ids, strict=True) if tag in ("all", tag_of(i))]
            picks = [row[judge][row["reward"].index(max(row["reward"]))] for row in rows]
            one = statistics.fmean(statistics.fmean(row[judge]) for row in rows)
            best = statistics.fmean(any(row[judge]) for row in rows)
            mine = statistics.fmean(picks)
            part = {"one": one, "chosen": mine, "best": best, "prompts": float(len(rows))}
            if best > one:
                part["share of the way"] = (mine - one) / (best - one)
            table[f"{judge}: {tag}"] = part
    return table


def at(record: dict[str, Any], key: str, limit: float) -> dict[str, Any] | None:
    """The best image of a run when ``key`` ("nfe" or "seconds") had come to ``limit``; None where
    no image was finished by then."""
    reached = [point for point in record["points"] if point[key] <= limit]
    return dict(reached[-1]) if reached else None


def seconds_at(record: dict[str, Any], limit: int) -> float:
    """Seconds of a run up to an NFE, by its mean speed."""
    return float(record["seconds"]) * min(1.0, limit / record["nfe"])


def rows_of(
    name: str, found: list[Any], base: list[Any], ids: Sequence[int], nfe: int
) -> list[Row]:
    """The table's rows of one way, at the budgets where each of its runs has an image."""
    tags = [tag_of(prompt_id) for prompt_id in ids]

    def mean(values: Sequence[float]) -> Estimate:
        return Estimate.of(interval(values, tags))

    rows: list[Row] = []
    for limit in (limit for limit in READ if limit <= nfe):
        reached = [at(record, "nfe", limit) for record in found]
        here = [point for point in reached if point is not None]
        if len(here) < len(found):
            continue
        there = [at(record, "nfe", limit) or record["points"][0] for record in base]
        times = [seconds_at(record, limit) for record in found]
        timely = [
            at(record, "seconds", seconds) or record["points"][0]
            for record, seconds in zip(base, times, strict=True)
        ]
        rows.append(
            {
                "method": name,
                "NFE": limit,
                "prompts": len(ids),
                "seconds": statistics.median(times),
                "reward": mean([point["reward"] for point in here]),
                "judge": mean([float(point["judge"]) for point in here]),
                "audit": mean([float(point["audit"]) for point in here]),
                "to best-of-N": mean([a["reward"] - b["reward"] for a, b in zip(here, there)]),
                "audit to best-of-N": mean(
                    [float(a["audit"]) - float(b["audit"]) for a, b in zip(here, there)]
                ),
                "at equal seconds": mean([a["reward"] - b["reward"] for a, b in zip(here, timely)]),
            }
        )
    return rows


def main() -> None:
    parser = command_line(__doc__, prompts=60, nfe=800, scale=3.0, work="build/search")
    parser.add_argument("--model", default="emoji")
    parser.add_argument(
        "--finished", action="store_true", help="each method on the prompts that it has finished"
    )
    parser.add_argument("--methods", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = stratified(options.prompts)
    pipe = da.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    # a fifth faster on a CPU
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    with Progress() as bar:
        ids = made(BASE, ids, options)
        base = dict(zip(ids, runs(BASE, pipe, ids, options, bar), strict=True))
        rows: list[Row] = []
        ties: dict[str, float] = {}
        own: dict[str, float] = {}
        paces: dict[str, dict[str, float]] = {}
        for name in options.methods:
            mine = made(name, ids, options)
            if not mine:
                continue
            ours, beside = runs(name, pipe, mine, options, bar), [base[i] for i in mine]
            rows += rows_of(name, ours, beside, mine, limit_of(name, options))
            ties[name] = sum(record["equal"] > 1 for record in ours) / len(ours)
            own[name] = statistics.median(record["own"] for record in ours)
            paces[name] = pace(ours, beside)
    if not rows:
        parser.error(f"--finished: no prompt is finished by {BASE} in {options.work!r}")
    facts = {
        "prompts": len(ids),
        "share of ties": ties,
        "share of the driver": own,
        "seconds per NFE": paces,
        "from one image to the best": way_to_the_best(list(base.values()), ids),
    }
    save("search", rows, options, COLUMNS, facts)


if __name__ == "__main__":
    main()
