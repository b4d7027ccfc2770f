"""Making the images of a run, unit by unit; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from diffalign.core.budget import Budget
from diffalign.core.registry import METHODS, to_config
from diffalign.core.seeds import seed_of
from diffalign.core.technique import Technique
from diffalign.core.types import Json
from diffalign.core.values import plain
from diffalign.eval.benchmarks import Benchmark, Item
from diffalign.eval.files import RunError, file_digest, storage
from diffalign.eval.folder import RunFolder
from diffalign.generate.seeds import Job
from diffalign.rewards.base import REWARDS

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.alignment.order import Order
    from diffalign.generate.models import Model


@dataclass(frozen=True, slots=True)
class Search:
    """A method that makes every image of a run, as ``da.align`` takes it."""

    # text like "best-of-n:n=4"
    method: str
    # name of the reward that it raises
    reward: str
    # limits of one image
    budget: Budget | None = None

    def check(self) -> None:
        """Raise ValueError for unknown names, and for a limit that depends on the machine."""
        from diffalign.alignment.order import method_of

        method_of(self.method)
        REWARDS.get(self.reward)
        if self.budget is not None and self.budget.seconds is not None:
            raise ValueError(
                "a budget in seconds makes other images on another machine; give nfe=... instead."
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made."""

    benchmark: Benchmark
    model: Model
    techniques: tuple[Technique, ...] = ()
    # images of a prompt, in one call of the pipeline
    samples: int = 4
    # base of all seeds
    seed: int = 0
    search: Search | None = None

    def settings(self) -> Json:
        """What defines the run, as JSON data: two runs with equal settings are the same run."""
        from diffalign import __version__

        pipe, search = self.model.pipe, self.search
        settings = {
            "diffalign": __version__,
            "benchmark": {
                "name": self.benchmark.name,
                "part": self.benchmark.part,
                "prompts": len(self.benchmark.items),
                "sha256": self.benchmark.digest,
            },
            "model": {
                "name": self.model.name,
                "pipeline": type(pipe).__name__,
                "revision": revision(self.model),
            },
            "techniques": [to_config(technique) for technique in self.techniques],
            "search": None
            if search is None
            else {
                "method": [METHODS.to_config(method) for method in METHODS.make(search.method)],
                "reward": search.reward,
                "budget": None if search.budget is None else asdict(search.budget),
            },
            "samples": self.samples,
            "seed": self.seed,
            "steps": self.model.steps,
            "scale": self.model.scale,
            "size": list(self.model.size.values()) or None,
            "negative_prompt": self.model.facts.get("negative_prompt"),
            "scheduler": {"name": self.model.scheduler, **_config(pipe.scheduler.config)},
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": pipe.device.type,
        }
        return json_data(settings)


def json_data(value: object) -> Json:
    """``value`` as it will be read back from a file."""
    data: Json = json.loads(json.dumps(plain(value), default=str))
    return data


def _config(config: Json) -> Json:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def revision(model: Model) -> str:
    """The commit of a hub model, else a hash of the weights of all networks."""
    import hashlib

    from torch.nn import Module

    from diffalign.core.identity import model_hash

    commit = getattr(model.pipe.config, "_commit_hash", None)
    if model.kind == "hub" and commit:
        return str(commit)
    networks: dict[str, Module] = {
        name: part
        for name, part in sorted(model.pipe.components.items())
        if isinstance(part, Module)
    }
    text = " ".join(f"{name}={model_hash(network)}" for name, network in networks.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """One thread inside an operation on a CPU: more of them change the last bits."""
    import torch

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate(
    plan: Plan,
    folder: RunFolder,
    items: Sequence[Item] | None = None,
    *,
    command: str = "",
    progress: Callable[[int], None] = lambda images: None,
) -> int:
    """Make the units of ``items``, of all if None, that are not finished; how many were made.

    ``command``: kept beside the seconds. ``progress`` is told the images of each unit.
    Cost: the images that are missing. Raises: ``RunError`` when the disk or the model fails; what
    is finished is kept.
    """
    items = plan.benchmark.items if items is None else items
    with storage(folder.path):
        missing = [item for item in items if not folder.finished(item)]
    progress(plan.samples * (len(items) - len(missing)))
    images = (_searched if plan.search else _sampled)(plan, missing)
    facts = environment(str(plan.model.pipe.device)) | {"command": command}
    with one_thread(plan.model.pipe.device.type):
        for item in missing:
            start, processor = time.perf_counter(), time.process_time()
            with _failing(folder, item):
                unit = next(images)
            timing = {
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - processor,
                "images": plan.samples,
                "date": _now(),
            }
            with storage(folder.path):
                _write(plan, folder, item, unit, timing | facts)
            progress(plan.samples)
    return len(missing)


@dataclass(frozen=True, slots=True)
class Unit:
    """The images of one prompt, with what they cost."""

    images: list[Image.Image]
    # of each image's PNG
    settings: list[Json]
    # of each image: nfe and perhaps decodes and rewards
    cost: list[Json]
    # of the call
    report: Json


@contextmanager
def _failing(folder: RunFolder, item: Item) -> Iterator[None]:
    """Inside, whatever the model raises becomes a ``RunError`` that names the prompt."""
    try:
        yield
    except Exception as error:
        count = sum(1 for _ in folder.entries())
        raise RunError(
            f"prompt {item.index} ({item.prompt!r}): {type(error).__name__}: {error} {count} "
            f"prompts are finished and kept in {folder.path}; the same command goes on from there."
        ) from error


def _write(plan: Plan, folder: RunFolder, item: Item, unit: Unit, timing: Json) -> None:
    """The images of a unit, then its record."""
    from diffalign.drawing.png import save_png

    folder.clear(plan.benchmark, item)
    samples = []
    for number, image in enumerate(unit.images):
        path = folder.image(plan.benchmark, item, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, path, unit.settings[number])
        name = plan.benchmark.file(item, number)
        seed = seed_of(item.place, number, plan.seed)
        entry = {"file": name, "sha256": file_digest(path), "seed": seed, "size": image.size}
        samples.append(entry | unit.cost[number])
    record = {
        "index": item.index,
        "prompt": item.prompt,
        "tag": item.tag,
        "place": item.place,
        "facts": item.facts,
        "samples": samples,
        "report": unit.report,
    }
    folder.finish(plan.benchmark, item, json_data(record), json_data(timing))


def _sampled(plan: Plan, items: Sequence[Item]) -> Iterator[Unit]:
    """Units by plain runs of the pipeline, one call each."""
    from diffalign.generate.samples import picture, samples

    jobs = [
        Job(item.prompt, seed_of(item.place, number, plan.seed), f"{item.name}-{number}")
        for item in items
        for number in range(plan.samples)
    ]
    for batch in samples(
        plan.model.pipe,
        plan.techniques,
        jobs,
        batch=plan.samples,
        call=plan.model.call,
        facts=plan.model.facts | {"base_seed": plan.seed},
        copies=plan.samples,
    ):
        report = batch[0].report
        cost = {
            "nfe": report.nfe,
            "decodes": 1 + report.decodes / len(batch),
            "rewards": report.rewards / len(batch),
        }
        yield Unit(
            [picture(sample.image) for sample in batch],
            [dict(sample.settings) for sample in batch],
            [cost for _ in batch],
            {
                "steps": report.steps,
                "guided_steps": report.guided_steps,
                "scale": _mean(report.scale),
                "nfe_cfg": report.nfe_cfg,
                "layers": report.layers,
                "resolved": report.resolved,
                "notes": report.notes,
            },
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known and finite, None of nothing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _searched(plan: Plan, items: Sequence[Item]) -> Iterator[Unit]:
    """Units by a search for each image."""
    from diffalign.alignment.door import search

    order = search_order(plan)
    for item in items:
        results = []
        for number in range(plan.samples):
            seed = seed_of(item.place, number, plan.seed)
            results.append(search(replace(order, seed=seed), item.prompt, None))
        yield Unit(
            [result.image for result in results],
            [{**result.settings, "score": result.score} for result in results],
            [
                {
                    "nfe": result.ledger.nfe,
                    "decodes": result.ledger.decodes,
                    "rewards": result.ledger.rewards,
                    "reward": result.score,
                    "tied": result.equal,
                }
                for result in results
            ],
            {"ends": sorted({result.end for result in results})},
        )


def search_order(plan: Plan) -> Order:
    """The order of a plan's search. The processes of a run search alone, each its own prompts.

    A method that branches has the kernel that it needs where the scheduler draws no noise.
    """
    from diffalign.alignment.arguments import kernel_of
    from diffalign.alignment.order import Order, method_of, reward_of, usual_kernel
    from diffalign.alignment.processes import World
    from diffalign.alignment.setting import Setting

    assert plan.search is not None
    method, model = method_of(plan.search.method), plan.model
    setting = Setting(model.pipe, plan.benchmark.items[0].prompt, plan.techniques, model.call)
    return Order(
        pipe=model.pipe,
        method=method,
        reward=reward_of(plan.search.reward),
        budget=plan.search.budget,
        techniques=plan.techniques,
        judges=(),
        ties=(),
        kernel=kernel_of(usual_kernel(setting, method)),
        batch=None,
        seed=plan.seed,
        call=model.call,
        world=World(),
    )


def environment(device: str) -> Json:
    """Where a unit is made: host, versions and device."""
    import diffusers
    import torch
    import transformers

    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
