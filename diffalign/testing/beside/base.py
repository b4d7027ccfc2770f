"""A neighbour: something that people have on a pipeline, beside which a technique must be right or
refuse by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffalign.core import Technique
from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

STEPS, BATCH = 3, 2


@dataclass(frozen=True, slots=True)
class Part:
    """Which images and which branch of a call its arguments are for."""

    images: tuple[int, ...] = tuple(range(BATCH))
    # "both" is a guided call; the others are unguided, with the prompt or with the negative prompt
    branch: Literal["both", "cond", "uncond"] = "both"
    # its latents are led along those of another run
    led: bool = False


Model = Any
"""A model or layer of diffusers, whose attributes have no types."""
Arguments = Callable[[Part], Keywords]
"""What a neighbour adds to the arguments of the pipeline's call."""
Put = Callable[[Pipeline], AbstractContextManager[Arguments]]
"""Puts a neighbour on a pipeline for a ``with`` block."""


def nothing(part: Part) -> Keywords:
    """For neighbours that need no further arguments."""
    return {}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Techniques that a neighbour rules out, and words of the sentence that says so."""

    # (registered name, class of the technique) -> whether it is meant
    meant: Callable[[str, type[Technique]], bool]
    words: str
    # pipelines where that holds, empty for all
    pipelines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """What is tested beside every technique."""

    name: str
    # heading of its table in the docs
    group: str
    # classes of tiny pipelines on which it is tested, the first one quickly
    pipelines: tuple[str, ...]
    put: Put
    # the same without its mechanism, such as fused weights for a loaded LoRA
    without: Put | None = None
    # of the pipeline with text encoders
    text: bool = False
    # further arguments of ``tiny_pipeline``
    variant: str = ""
    # each branch can be evaluated alone, by the pipeline itself
    branches: bool = True
    # classes whose unconditional branch takes what the conditional one has made
    shared: tuple[str, ...] = ()
    # pictures and the like travel with the images: each image alone is the same
    images: bool = False
    # what it computes depends on earlier steps: a technique of almost no effect changes almost
    # nothing
    remembers: bool = False
    # how far it may be from ``without``, relative to the largest value; None is rounding
    bound: float | None = None
    refusals: tuple[Refusal, ...] = ()
    slow: bool = False
    # what the docs say of it, if anything
    note: str = ""

    def refusal(self, name: str, cls: type[Technique], pipeline: str) -> str:
        """Words of the sentence that refuses a technique on a pipeline class; empty if none."""
        for refusal in self.refusals:
            if refusal.meant(name, cls) and pipeline in (refusal.pipelines or (pipeline,)):
                return refusal.words
        return ""

    def pipeline(self, name: str) -> Pipeline:
        """The tiny pipeline of that class, without the neighbour."""
        return tiny_pipeline(name, variant=self.variant, text=self.text)

    def inputs(self, name: str, part: Part, steps: int = STEPS) -> Keywords:
        """Arguments of a call without what the neighbour adds."""
        inputs = tiny_inputs(
            name,
            variant=self.variant,
            text=self.text,
            batch=BATCH,
            steps=steps,
            guided=part.branch == "both",
        )
        if part.branch == "uncond":
            negative = {key: inputs.get(f"negative_{key}") for key in inputs}
            inputs |= {key: value for key, value in negative.items() if value is not None}
        return {key: _of(value, part.images) for key, value in inputs.items()}


def _of(value: object, images: tuple[int, ...]) -> object:
    """The entries of some images in an argument that has one for each."""
    if isinstance(value, torch.Tensor):
        return value[list(images)] if value.ndim and len(value) == BATCH else value
    if not isinstance(value, list):
        return value
    if len(value) == BATCH and isinstance(value[0], str | torch.Generator):
        return [value[image] for image in images]
    return [_of(item, images) for item in value]


def by_seam(*seams: str) -> Callable[[str, type[Technique]], bool]:
    """Techniques that enter by one of these seams."""
    return lambda name, cls: cls.seam in seams


def by_name(*names: str) -> Callable[[str, type[Technique]], bool]:
    """Techniques by their registered names."""
    return lambda name, cls: name in names


def denoiser_of(pipe: Pipeline) -> str:
    """The attribute of a pipeline that holds its first denoiser."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def chosen_rows(rows: Iterable[int] | None) -> slice | list[int]:
    """An index for the rows of a pass; None is all of them."""
    return slice(None) if rows is None else list(rows)
