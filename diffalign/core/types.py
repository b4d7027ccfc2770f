"""Where sampling is and which evaluations a step needs. Read this first, then ``guidance.py``.

Shape letters are fixed everywhere: ``B`` rows (images), ``C H W`` latent, ``T`` frames, ``L`` text
tokens, ``N`` image tokens, ``A`` heads, ``D`` head size, ``K`` candidates. A technique is a frozen
dataclass; what changes while sampling is explicit state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffalign.core.attention import AttentionTechnique

Pipeline = Any
"""A pipeline of diffusers, which has no types."""
Scheduler = Any
"""A scheduler of diffusers."""
Keywords = dict[str, Any]
"""Keyword arguments of a class or function without types, such as a pipeline's call."""
Json = dict[str, Any]
"""An object of JSON, in a file or for one."""
Space = Literal["native", "eps", "x0"]
Mix = Callable[["Tensor", "Tensor", "float | Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One named denoiser evaluation. Two passes are the same pass when their names are."""

    name: str
    # with the prompt, or with the negative (empty) prompt
    conditioned: bool
    # names of the blocks that this pass skips
    blocks: tuple[str, ...] | None = field(default=None, compare=False)
    # images it is needed for, None is all; the prediction has len(rows) rows, in that order
    rows: tuple[int, ...] | None = field(default=None, compare=False)
    # what it changes in the attention of chosen layers
    attention: AttentionTechnique | None = field(default=None, compare=False)
    # a denoiser that makes it in place of the pipeline's own, called with the same arguments
    module: Module | None = field(default=None, compare=False)

    @property
    def alone(self) -> bool:
        """Whether it needs a denoiser call of its own."""
        return any(part is not None for part in (self.blocks, self.attention, self.module))


COND = Pass("cond", True)
UNCOND = Pass("uncond", False)
CFG_PASSES = (COND, UNCOND)


def linear_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    ``uncond + scale * (cond - uncond)`` on predictions [B, ...]; ``scale``: a number or [B, 1...].
    """
    return uncond + scale * (cond - uncond)


def _native_only(
    prediction: Tensor, source: Space, target: Space, rows: Sequence[int] | None = None
) -> Tensor:
    if source != target:
        raise ValueError(
            f"This StepInfo has no parametrisation and cannot convert {source!r} to {target!r}."
        )
    return prediction


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Where sampling is: told by the clock, never counted by a technique."""

    # position of the step in [0, count), 0 is the noisiest; solvers with two evaluations keep one
    index: int
    # steps of the whole trajectory, also in a segment of it
    count: int
    # noise level: sqrt((1-abar)/abar) for variance preserving and exploding models; in [0, 1] for
    # flow models
    sigma: float
    # noise level after the step
    sigma_next: float = 0.0
    # what the scheduler calls it
    timestep: float = float("nan")
    # 0, or 1 for the second evaluation of a two-evaluation solver
    evaluation: int = 0
    # guidance in the pipeline's own arithmetic: (cond, uncond, scale) -> guided
    mix: Mix = linear_mix
    # (prediction, source, target, rows=None) in float32; rows: which images the prediction holds
    convert: Callable[..., Tensor] = _native_only

    @property
    def progress(self) -> float:
        """``index / (count - 1)`` in [0, 1]; 0 for a single step."""
        return self.index / (self.count - 1) if self.count > 1 else 0.0
