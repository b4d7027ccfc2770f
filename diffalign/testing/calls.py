"""Calls of tiny pipelines with and without techniques, as tests of the seams make them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import diffalign as da
from diffalign.core import Technique
from diffalign.core.types import Pipeline
from diffalign.seams import Report
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs


def model_of(pipe: Pipeline) -> nn.Module:
    """The denoiser."""
    model: nn.Module = getattr(pipe, "unet", None) or pipe.transformer
    return model


def nag(scale: float = 4.0, **options: object) -> da.NAG:
    """NAG with options of its own at every step, whatever the model's defaults are."""
    usual: dict[str, object] = {"tau": 1.6, "alpha": 0.7, "sigma": (0.0, float("inf"))}
    return da.NAG(scale, **(usual | options))  # type: ignore[arg-type]


def run(
    pipe: Pipeline, name: str, *techniques: Technique, **inputs: object
) -> tuple[Tensor, Callable[[], Report] | None]:
    """Two images in two steps of the tiny pipeline of a class, and what gives the report."""
    arguments = {**tiny_inputs(name, batch=2, steps=2), **inputs}
    if not techniques:
        return final(pipe, arguments), None
    with da.apply(pipe, *techniques) as session:
        return final(pipe, arguments), session.report
