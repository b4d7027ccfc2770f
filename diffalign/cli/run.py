"""Make the images of a request, batch by batch.

Image i of every prompt has the seed ``seed + i``, whatever shares its batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from PIL import Image

from diffalign import Report, apply
from diffalign.cli.request import Column, Request

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One image: index of its prompt, and its seed."""

    prompt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Finished images of one call, with the techniques' settings and the report of that call."""

    jobs: tuple[Job, ...]
    images: tuple[Image.Image, ...]
    config: dict[str, Any]
    report: Report


def jobs(request: Request) -> list[Job]:
    """Every image of one column, prompt by prompt."""
    return [
        Job(p, request.seed + i) for p in range(len(request.prompts)) for i in range(request.count)
    ]


def arguments(request: Request, batch: Sequence[Job]) -> dict[str, Any]:
    """The pipeline call for these images; the generators are fresh."""
    import torch

    model, family = request.model, request.model.family
    call: dict[str, Any] = {
        "prompt": [request.prompts[job.prompt] for job in batch],
        "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in batch],
        "num_inference_steps": request.steps,
    }
    if request.scale is not None:
        call[family.gates[0]] = model.native(request.scale)
    negative = request.negative_prompt
    if negative is None and family.needs_negative and model.native(request.scale) > family.on_above:
        negative = ""
    if negative is not None:
        call["negative_prompt"] = [negative] * len(batch)
    if request.size is not None:
        call["height"], call["width"] = request.size
    return call


def counting(
    request: Request, advance: Advance | None
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """How to call ``advance`` once a step: what to add to the call of the pipeline, and what to
    call after it with its number of images."""
    counted = advance is not None and "callback_on_step_end" in request.model.parameters()

    def step(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if advance is not None:
            advance()
        return values

    def after(images: int) -> None:
        if advance is not None and not counted:
            for _ in range(request.steps):
                advance()

    return {"callback_on_step_end": step} if counted else {}, after


def batches(request: Request, column: Column, advance: Advance | None = None) -> Iterator[Batch]:
    """Run one column.

    ``advance`` is called after each step where the pipeline can report it, else after each batch.
    """
    todo = jobs(request)
    more, after = counting(request, advance)
    for first in range(0, len(todo), request.batch):
        part = todo[first : first + request.batch]
        with apply(request.pipe, *column.techniques) as session:
            images = request.pipe(**arguments(request, part), **more).images
        after(len(part))
        yield Batch(tuple(part), tuple(images), session.config(), session.report())


def warm_up(request: Request) -> None:
    """Two plain steps of the first batch, so that one-time costs fall on no column."""
    request.pipe(**{**arguments(request, jobs(request)[: request.batch]), "num_inference_steps": 2})


def merged(reports: Sequence[Report]) -> Report:
    """Reports of several batches as one: sums of work, means per image weighted by the images of
    each batch."""
    images = sum(r.images for r in reports)

    def mean(values: Sequence[tuple[float | None, int]]) -> float | None:
        known = [(value, weight) for value, weight in values if value is not None]
        return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None

    def column(name: str) -> list[float | None]:
        return [
            mean([(v, r.images) for v, r in zip(values, reports)])
            for values in zip_longest(*(getattr(r, name) for r in reports))
        ]

    return Report(
        pipeline=reports[0].pipeline,
        images=images,
        steps=reports[0].steps,
        guided_steps=max(r.guided_steps for r in reports),
        nfe=sum(r.nfe * r.images for r in reports) / max(images, 1),
        nfe_cfg=reports[0].nfe_cfg,
        rows=sum(r.rows for r in reports),
        calls=sum(r.calls for r in reports),
        seconds=sum(r.seconds for r in reports),
        sigma=reports[0].sigma,
        scale=column("scale"),
        orthogonal=column("orthogonal"),
        cosine=column("cosine"),
        layers=reports[0].layers,
        acted=reports[0].acted,
        resolved=reports[0].resolved,
        extras=reports[0].extras if len(reports) == 1 else {},
        notes=list(dict.fromkeys(note for r in reports for note in r.notes)),
    )


def settings(request: Request, job: Job, config: dict[str, Any]) -> dict[str, object]:
    """What a saved image carries; ``diffalign.techniques_of`` reads the techniques back."""
    return {
        **config,
        "model": request.model.name,
        "pipeline": request.model.cls.__name__,
        "prompt": request.prompts[job.prompt],
        "negative_prompt": request.negative_prompt,
        "seed": job.seed,
        "steps": request.steps,
        "scale": request.model.scale(request.scale),
        "size": list(request.size) if request.size else None,
        "scheduler": request.scheduler,
        "dtype": request.dtype,
        "device": request.device,
    }


def file_name(request: Request, job: Job) -> str:
    """Readable and unique within a column."""
    slug = (
        re.sub(r"[^a-z0-9]+", "-", request.prompts[job.prompt].lower())[:40].strip("-") or "prompt"
    )
    return f"{job.prompt:03d}-{slug}-s{job.seed}.png"
