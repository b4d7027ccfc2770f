"""Compiled denoisers in the four documented forms, with dynamo's eager backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch

from diffalign.core import Technique
from diffalign.core.types import Pipeline
from diffalign.testing.beside.base import Arguments, Neighbour, Refusal, denoiser_of, nothing

SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
WAN = "WanPipeline"


@contextmanager
def plain(pipe: Pipeline) -> Iterator[Arguments]:
    """Nothing is compiled."""
    yield nothing


@contextmanager
def compiled(
    pipe: Pipeline, way: Literal["wrapper", "in place", "regional", "fullgraph"]
) -> Iterator[Arguments]:
    """The denoiser compiled; graphs are dropped before and after."""
    name = denoiser_of(pipe)
    model = getattr(pipe, name)
    torch._dynamo.reset()
    if way == "wrapper":
        setattr(pipe, name, torch.compile(model, backend="eager"))
    elif way == "regional":
        model.compile_repeated_blocks(backend="eager")
    else:
        model.compile(backend="eager", fullgraph=way == "fullgraph")
    try:
        yield nothing
    finally:
        setattr(pipe, name, model)
        for module in model.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


def acts_inside(name: str, cls: type[Technique]) -> bool:
    """Techniques that change what the denoiser does, not only how it is called."""
    names = ("s2-guidance", "skip-layer-guidance", "pag", "seg")
    return cls.seam in ("attention", "tokens") or name in names


GROUP = "Compiled models"
NEIGHBOURS = [
    Neighbour(
        name="torch.compile(model)",
        group=GROUP,
        pipelines=(SD, SD3, FLUX),
        put=partial(compiled, way="wrapper"),
        without=plain,
        branches=False,
        slow=True,
    ),
    Neighbour(
        name="model.compile()",
        group=GROUP,
        pipelines=(SD, SD3, FLUX, WAN),
        put=partial(compiled, way="in place"),
        without=plain,
        branches=False,
        slow=True,
    ),
    Neighbour(
        name="compile_repeated_blocks()",
        group=GROUP,
        pipelines=(SD, FLUX, WAN),
        put=partial(compiled, way="regional"),
        without=plain,
        branches=False,
        slow=True,
    ),
    Neighbour(
        name="model.compile(fullgraph=True)",
        group=GROUP,
        pipelines=(SD, FLUX),
        put=partial(compiled, way="fullgraph"),
        without=plain,
        branches=False,
        slow=True,
        refusals=(Refusal(acts_inside, "compile the model without fullgraph=True"),),
    ),
]
