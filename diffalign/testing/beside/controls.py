"""ControlNets in their forms, and T2I adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal
from unittest.mock import patch

import torch
from diffusers import FluxMultiControlNetModel, SD3MultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.beside.base import BATCH, Arguments, Neighbour, Part, nothing
from diffalign.testing.tiny.base import Draw, randomise

SD = "StableDiffusionControlNetPipeline"
SDXL = "StableDiffusionXLControlNetPipeline"
SD3, FLUX = "StableDiffusion3ControlNetPipeline", "FluxControlNetPipeline"
UNION = "StableDiffusionXLControlNetUnionPipeline"
SEVERAL = {
    SD: MultiControlNetModel,
    SDXL: MultiControlNetModel,
    SD3: SD3MultiControlNetModel,
    FLUX: FluxMultiControlNetModel,
    UNION: MultiControlNetUnionModel,
}
DRAW = Draw(6, torch.float32)


def steady() -> AbstractContextManager[object]:
    """Images are encoded as the mean of what they may be.

    Some pipelines draw the encoding of a control image from the global generator, for both branches
    at once, so that no call of one branch or one image has the same.
    """
    return patch.object(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())


@contextmanager
def itself(pipe: Pipeline) -> Iterator[Arguments]:
    """The control network that the pipeline has already."""
    with steady():
        yield nothing


@contextmanager
def compiled(pipe: Pipeline, way: Literal["wrapper", "in place"]) -> Iterator[Arguments]:
    """The control network compiled, in both documented forms."""
    before = pipe.controlnet
    if way == "wrapper":
        pipe.controlnet = torch.compile(before, backend="eager")
    else:
        before.compile(backend="eager")
    try:
        yield nothing
    finally:
        pipe.controlnet = before
        before._compiled_call_impl = None


@contextmanager
def several(pipe: Pipeline) -> Iterator[Arguments]:
    """Two control networks with weights and an image of their own."""
    before, name = pipe.controlnet, type(pipe).__name__
    second = copy.deepcopy(before)
    randomise(second, torch.Generator().manual_seed(8))
    pipe.controlnet = SEVERAL[name]([before, second])
    controls = [DRAW.image(f"control {index}", BATCH, 3, 16, 16) for index in range(2)]
    argument = "image" if name in (SD, SDXL) else "control_image"

    def arguments(part: Part) -> Keywords:
        images = [control[list(part.images)] for control in controls]
        further: Keywords = {argument: images, "controlnet_conditioning_scale": [0.7, 0.4]}
        if name == UNION:
            further["control_mode"] = [[0], [1]]
            further[argument] = [[image] for image in images]
        return further

    try:
        with steady():
            yield arguments
    finally:
        pipe.controlnet = before


@contextmanager
def guessing(pipe: Pipeline) -> Iterator[Arguments]:
    """Guess mode: the control network runs the conditional rows alone."""
    yield lambda part: {"guess_mode": True}


@contextmanager
def windowed(pipe: Pipeline) -> Iterator[Arguments]:
    """The control network acts in the first half of the steps."""
    with steady():
        yield lambda part: {"control_guidance_end": 0.5}


GROUP = "ControlNets and T2I adapters"
NEIGHBOURS = [
    Neighbour(
        name="ControlNet",
        group=GROUP,
        pipelines=(SD, SDXL, SD3, FLUX),
        shared=(FLUX,),
        put=itself,
        images=True,
    ),
    Neighbour(
        name="ControlNet, in its guess mode",
        group=GROUP,
        pipelines=(SD, SDXL),
        put=guessing,
        branches=False,
        images=True,
    ),
    Neighbour(
        name="ControlNet in half of the steps",
        group=GROUP,
        pipelines=(SD, SDXL, SD3, FLUX),
        shared=(FLUX,),
        put=windowed,
        images=True,
    ),
    Neighbour(
        name="several ControlNets",
        group=GROUP,
        pipelines=(SD, SDXL, SD3, FLUX),
        shared=(FLUX,),
        put=several,
        images=True,
    ),
    Neighbour(
        name="union ControlNet",
        group=GROUP,
        pipelines=(UNION,),
        put=itself,
        note="images of one batch depend on each other in diffusers itself",
    ),
    Neighbour(
        name="compiled ControlNet",
        group=GROUP,
        pipelines=(SD, SDXL, UNION),
        put=partial(compiled, way="wrapper"),
        without=itself,
        slow=True,
    ),
    Neighbour(
        name="ControlNet compiled in place",
        group=GROUP,
        pipelines=(SD,),
        put=partial(compiled, way="in place"),
        without=itself,
        slow=True,
    ),
    Neighbour(
        name="T2I adapter",
        group=GROUP,
        pipelines=("StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"),
        put=itself,
        images=True,
    ),
]
