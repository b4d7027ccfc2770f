"""A request: options and techniques that were checked, with the pipeline that will serve them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.cli.options import (
    Options,
    read_device,
    read_numbers,
    read_prompts,
    read_size,
    writable,
)
from diffalign.cli.problem import BadInput, checking
from diffalign.generate import schedulers
from diffalign.generate.models import Model, check_technique, find, load

EMBEDDED = {"emoji": {"steps": 20, "scale": 1.5}}
"""What ``--steps`` and ``--scale`` are for an embedded model when they are left out."""


@dataclass(frozen=True, slots=True)
class Column:
    """One variant of every image: no technique is the plain pipeline, whose empty label becomes
    "CFG 7.5", or "plain" without guidance."""

    label: str
    techniques: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Checked: ``pipe`` is loaded, every technique fits it, ``output`` can be written, ``size`` is
    (height, width) or the model's."""

    model: Model
    pipe: Any
    columns: tuple[Column, ...]
    prompts: tuple[str, ...]
    negative_prompt: str | None
    steps: int
    scale: float | None
    seed: int
    count: int
    batch: int
    size: tuple[int, int] | None
    scheduler: str
    dtype: str
    device: str
    output: Path


def prepare(options: Options, columns: tuple[Column, ...]) -> Request:
    """Check everything, cheapest first, then load the model.

    Raises ``BadInput`` with the first thing that cannot be used.
    """
    import diffalign

    prompts, size = read_prompts(options), read_size(options.size)
    read_numbers(options)
    model = find(options.model)
    defaults: dict[str, Any] = EMBEDDED.get(model.name, {}) if model.kind == "embedded" else {}
    for (
        column
    ) in columns:  # an object without components is enough to see conflicts and refused classes
        with checking():
            diffalign.apply(object.__new__(model.cls), *column.techniques)
    parameters = model.parameters()
    for name, given in (("negative_prompt", options.negative_prompt), ("height", size)):
        if given is not None and name not in parameters:
            option = {"height": "--size"}.get(name, "--negative-prompt")
            raise BadInput(f"{option}: {model.cls.__name__} takes no {name}; leave the option out.")
    scheduler = (
        schedulers.class_name(options.scheduler, model.scheduler)
        if options.scheduler
        else model.scheduler
    )
    device, dtype = read_device(options.device, options.dtype)
    output = writable(options.output)
    steps = options.steps or defaults.get("steps") or int(parameters["num_inference_steps"].default)
    scale = options.scale if options.scale is not None else defaults.get("scale")
    pipe = load(model, dtype, device)
    schedulers.replace(pipe, scheduler)
    schedulers.check_steps(pipe.scheduler, steps)
    factor = int(getattr(pipe, "vae_scale_factor", 1))
    if size is not None and any(side % factor for side in size):
        raise BadInput(
            f"--size must be a multiple of {factor} for this model; got {options.size!r}."
        )
    for column in columns:
        check_technique(model, pipe, column.techniques, scale, steps)
    guided = model.scale(scale)
    plain = f"CFG {guided:g}" if guided != 1.0 else "plain"
    return Request(
        model=model,
        pipe=pipe,
        columns=tuple(replace(column, label=column.label or plain) for column in columns),
        prompts=prompts,
        negative_prompt=options.negative_prompt,
        steps=steps,
        scale=scale,
        seed=options.seed,
        count=options.count,
        batch=options.batch,
        size=size,
        scheduler=scheduler,
        dtype=dtype,
        device=device,
        output=output,
    )
