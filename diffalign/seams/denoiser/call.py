"""One call of a denoiser, as the pipeline makes it and as techniques see it; and one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffalign.core import Pass, StepInfo, UnsupportedModel
from diffalign.seams.denoiser.rows import count_rows, parameter_names
from diffalign.seams.swap import original_class, unwrapped


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """The pipeline called its denoiser."""

    # attribute of the pipeline that holds the denoiser
    denoiser: str
    module: Any
    # the denoiser's own call, beneath every technique
    original: Callable[..., Any]
    # by name, positional ones too
    arguments: dict[str, Any]
    # the first argument: a tensor [rows, ...], or a list of rows
    latents: Any
    rows: int


def pipeline_call(
    denoiser: str,
    module: Any,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PipelineCall:
    """The call with its arguments by name."""
    names = parameter_names(original_class(unwrapped(module))) if args else ()
    arguments = {**dict(zip(names, args)), **kwargs}
    latents = next(iter(arguments.values()))
    return PipelineCall(denoiser, module, original, arguments, latents, count_rows(latents))


@dataclass(frozen=True, slots=True)
class DenoiserCall:
    """One evaluation as attention and block techniques see it."""

    denoiser: str
    step: StepInfo
    # passes whose rows stand in the batch, one after the other
    passes: tuple[Pass, ...]
    # for each row, whether it carries the prompt
    conditioned: tuple[bool, ...]
    # rows that a technique added at the end: (row, the row that repeats it with another text)
    copies: tuple[tuple[int, int], ...] = ()

    def images(self, batch: int) -> list[int]:
        """Which of ``batch`` images each row belongs to."""
        every, rows = range(batch), len(self.conditioned) - len(self.copies)
        images = [i for p in self.passes for i in (every if p.rows is None else p.rows)]
        if len(images) != rows:  # compiled and cached models run whole branches
            images = [i for _ in self.passes for i in every]
        if len(images) != rows:
            raise UnsupportedModel(
                f"Expected {len(images)} rows at the denoiser, {batch} images for each of "
                f"{[p.name for p in self.passes]}; got {rows}."
            )
        return images + [images[row] for row, _ in self.copies]


Denoise = Callable[[DenoiserCall, dict[str, Any]], Any]
"""The denoiser or what techniques have put around it: (call, arguments) -> the model's output."""


@dataclass(slots=True)
class Step:
    """What one step knows: a new one begins after every ``scheduler.step``."""

    info: StepInfo
    # shape of one image's latent
    shape: tuple[int, ...]
    # predictions of the passes evaluated so far
    preds: dict[Pass, Tensor] = field(default_factory=dict)
    # the prediction that must reach the scheduler, [B, ...]
    guided: Tensor | None = None
    # the conditional prediction, where the answer has the algebraic form
    algebraic: Tensor | None = None
    # denoiser calls of the pipeline in this step
    calls: int = 0
