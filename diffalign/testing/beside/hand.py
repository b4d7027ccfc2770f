"""A pass evaluated by hand: the pipeline itself without guidance and without any technique, led
along the latents of another run, with what the pass changes done plainly."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.core import Guidance, Pass
from diffalign.core.types import Keywords, Pipeline
from diffalign.families import block_streams
from diffalign.seams.denoiser.call import Step
from diffalign.seams.denoiser.tap import Generation
from diffalign.seams.swap import original_class, unwrapped
from diffalign.testing.beside.base import Model, denoiser_of
from diffalign.testing.beside.maps import changed_maps
from diffalign.testing.final import final


@dataclass(slots=True)
class Track:
    """What reached ``scheduler.step`` in one call of a pipeline, one entry per step."""

    latents: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)


@contextmanager
def tracked(pipe: Pipeline, way: Sequence[Tensor] = ()) -> Iterator[Track]:
    """Notes what reaches the scheduler; the latents before each step become those of ``way``."""
    track, step = Track(), pipe.scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)
    def noted(*args: object, **kwargs: object) -> object:
        arguments = signature.bind(*args, **kwargs).arguments
        track.latents.append(arguments["sample"].clone())
        track.predictions.append(arguments["model_output"].clone())
        output = step(*args, **kwargs)
        if len(track.latents) >= len(way):
            return output
        following = way[len(track.latents)]
        if isinstance(output, tuple):
            return (following, *output[1:])
        output = copy.copy(output)
        output.prev_sample = following
        return output

    pipe.scheduler.step = noted
    try:
        yield track
    finally:
        del pipe.scheduler.step


Evaluations = list[dict[Pass, Tensor]]
"""The predictions of every pass, one entry per step."""


@contextmanager
def evaluations() -> Iterator[Evaluations]:
    """Notes what every guided step of a session combines."""
    steps: Evaluations = []
    combine = Generation.combine

    def noted(generation: Generation, guidance: Guidance[object], step: Step) -> Tensor:
        steps.append({p: value.clone() for p, value in step.preds.items()})
        return combine(generation, guidance, step)

    setattr(Generation, "combine", noted)  # noqa: B010
    try:
        yield steps
    finally:
        setattr(Generation, "combine", combine)  # noqa: B010


@contextmanager
def without_blocks(denoiser: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Blocks that hand on what comes in, by forward hooks."""

    def skip(block: Model, args: tuple[object, ...], kwargs: Keywords, output: object) -> object:
        cls: Model = original_class(block)
        bound = inspect.signature(cls.forward).bind(block, *args, **kwargs)
        streams = tuple(bound.arguments[name] for name in block_streams()[cls.__name__])
        return streams[0] if len(streams) == 1 else streams

    with ExitStack() as stack:
        for name in names:
            block = unwrapped(denoiser).get_submodule(name)
            stack.callback(block.register_forward_hook(skip, with_kwargs=True).remove)
        yield


@contextmanager
def replaced(pipe: Pipeline, denoiser: str, module: nn.Module | None) -> Iterator[None]:
    """Another denoiser in place of the pipeline's."""
    before = getattr(pipe, denoiser)
    setattr(pipe, denoiser, before if module is None else module)
    try:
        yield
    finally:
        setattr(pipe, denoiser, before)


def alone(pipe: Pipeline, p: Pass, arguments: Keywords, way: Sequence[Tensor]) -> list[Tensor]:
    """Predictions of a pass at each of the latents of ``way``, [B, ...] each.

    ``arguments``: of a call without guidance, with the text that the pass reads.
    """
    name = denoiser_of(pipe)
    text = arguments["prompt_embeds"].shape[1] if "prompt_embeds" in arguments else 0
    frames = way[0].shape[2] if way[0].ndim == 5 else 1
    with ExitStack() as stack:
        stack.enter_context(replaced(pipe, name, p.module))
        stack.enter_context(without_blocks(getattr(pipe, name), p.blocks or ()))
        stack.enter_context(changed_maps(pipe, name, p.attention, text, frames))
        track = stack.enter_context(tracked(pipe, way))
        final(pipe, arguments)
    for here, there in zip(track.latents, way, strict=True):
        assert torch.equal(here, there), "the run was not led along these latents"
    return track.predictions
