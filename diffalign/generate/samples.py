"""The one sampling loop: jobs in, images with reports and settings out, batch by batch.

Whatever makes many images (command line, page, evaluation, calibration, training, benchmarks)
iterates ``samples``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.core.technique import Technique
from diffalign.core.types import Json, Keywords, Pipeline
from diffalign.generate.seeds import Job
from diffalign.seams import Report, apply

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Job", "Sample", "merged", "picture", "samples"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished image."""

    job: Job
    # [3, H, W] in [0, 1], of a video pipeline [T, 3, H, W]; float32 on the CPU
    image: Tensor
    # of the call that made it, shared by its batch
    report: Report
    # what a PNG of it carries; ``diffalign.techniques_of`` reads the techniques back
    settings: Json


def samples(
    pipe: Pipeline,
    techniques: Sequence[Technique],
    jobs: Sequence[Job],
    *,
    batch: int,
    call: Mapping[str, object] | None = None,
    facts: Mapping[str, object] | None = None,
    copies: int = 1,
    step: Callable[[], None] | None = None,
) -> Iterator[list[Sample]]:
    """Run ``pipe`` with ``techniques`` on all ``jobs``, ``batch`` images per call.

    ``call``: further arguments of the pipeline; a negative prompt is one text for all images, and
    ``output_type="latent"`` leaves images undecoded. ``facts``: further settings of the samples.
    ``copies``: consecutive jobs that share a prompt, which is then encoded once.
    ``step`` is called after each step, or after each batch as often as the batch had steps where
    the pipeline cannot tell. What it raises ends the run. Between batches the pipeline is plain.
    Raises: whatever ``apply`` and the pipeline raise; ValueError for jobs without ``copies``.
    """
    arguments, report_steps = _arguments(pipe, call or {}, step)
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        with apply(pipe, *techniques) as session:
            images = pipe(**_rows(part, copies, arguments))[0]
        if report_steps is not None:
            report_steps()
        report = session.report()
        settings = session.config() | _facts(pipe) | dict(facts or {})
        yield [
            Sample(job, image, report, settings | {"prompt": job.prompt, "seed": job.seed})
            for job, image in zip(part, images.detach().to("cpu", torch.float32), strict=True)
        ]


def _arguments(
    pipe: Pipeline, call: Mapping[str, Any], step: Callable[[], None] | None
) -> tuple[Keywords, Callable[[], None] | None]:
    """The arguments that all calls share, and how to report steps after a call, None if it is done.

    The pipeline reports its steps by itself where it can.
    """
    arguments = {"output_type": "pt", **call}
    if step is None:
        return arguments, None
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:

        def after_step(pipe: Pipeline, index: int, time: object, values: Keywords) -> Keywords:
            step()
            return values

        return {**arguments, "callback_on_step_end": after_step}, None

    def after_call() -> None:
        for _ in range(call.get("num_inference_steps", 0)):
            step()

    return arguments, after_call


def _rows(jobs: Sequence[Job], copies: int, arguments: Keywords) -> Keywords:
    """The arguments of one call: a prompt and a fresh generator for each image."""
    prompts = [job.prompt for job in jobs[::copies]]
    if [job.prompt for job in jobs] != [prompt for prompt in prompts for _ in range(copies)]:
        raise ValueError(
            f"samples(copies={copies}) needs {copies} consecutive jobs of each prompt in every "
            f"batch; got {[job.prompt for job in jobs]}. Sort the jobs by prompt, and let batch be "
            "a multiple of copies."
        )
    rows: Keywords = {
        **arguments,
        "prompt": prompts,
        "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
    }
    if copies != 1:
        rows["num_images_per_prompt"] = copies
    if isinstance(rows.get("negative_prompt"), str):
        rows["negative_prompt"] = [rows["negative_prompt"]] * len(prompts)
    return rows


def _facts(pipe: Pipeline) -> dict[str, str]:
    """What settings say of the pipeline as it is."""
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
    }


def picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1] as a Pillow image of 8 bits, as diffusers rounds it."""
    from PIL import Image

    pixels = (image.permute(1, 2, 0).float() * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


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
