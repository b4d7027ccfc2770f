"""The whole idea in one file: what a technique may see, ask for and return. Read this first.

Shape letters are fixed everywhere: ``B`` rows (images), ``C H W`` latent, ``T`` frames, ``L`` text
tokens, ``N`` image tokens, ``A`` heads, ``D`` head size, ``K`` candidates. A technique is a frozen
dataclass; what changes while sampling is explicit state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "COND",
    "UNCOND",
    "Pass",
    "Reward",
    "Sampler",
    "Search",
    "Site",
    "Space",
    "StepInfo",
    "Tensor",
    "linear_mix",
]

Space = Literal["native", "eps", "x0"]
Mix = Callable[[Tensor, Tensor, "float | Tensor"], Tensor]
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Pass:
    """One named denoiser evaluation. Two passes are the same pass when their names are.

    ``conditioned``: with the prompt, or with the negative (empty) prompt. ``blocks``: names of
    blocks that this pass skips. ``rows``: the images it is needed for, None is all of them; the
    prediction then has ``len(rows)`` rows, in that order.
    """

    name: str
    conditioned: bool
    blocks: tuple[str, ...] | None = field(default=None, compare=False)
    rows: tuple[int, ...] | None = field(default=None, compare=False)


COND = Pass("cond", True)
UNCOND = Pass("uncond", False)


def linear_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``uncond + scale * (cond - uncond)``: classifier-free guidance (Ho and Salimans 2022,
    arXiv:2207.12598)."""
    return uncond + scale * (cond - uncond)


def _native_only(
    prediction: Tensor, source: Space, target: Space, rows: Sequence[int] | None = None
) -> Tensor:
    if source != target:
        raise ValueError(
            f"This StepInfo was made without a parametrisation and cannot convert {source!r} to "
            f"{target!r}."
        )
    return prediction


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Where sampling is.

    ``index`` in [0, count): 0 is the noisiest step; solvers with two evaluations keep one index per
    step and count ``evaluation``. ``sigma``, ``sigma_next``: noise level here and after the step:
    sqrt((1-abar)/abar) for variance preserving and exploding models, in [0, 1] for flow models.
    ``timestep``: what the scheduler calls it. ``mix``: guidance in the pipeline's own arithmetic.
    ``convert(prediction, source, target, rows=None)`` changes the space in float32; pass ``rows``
    when the prediction holds only those.
    """

    index: int
    count: int
    sigma: float
    sigma_next: float = 0.0
    timestep: float = float("nan")
    evaluation: int = 0
    mix: Mix = linear_mix
    convert: Callable[..., Tensor] = _native_only

    @property
    def progress(self) -> float:
        """``index / (count - 1)`` in [0, 1]; 0 for a single step."""
        return self.index / (self.count - 1) if self.count > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Site:
    """One attention layer as a technique sees it, in one denoiser call.

    ``layer``: dotted module name. ``kind``: "cross" (text keys only), "joint" (text and image in
    one softmax) or "self". ``text``, ``image``: positions of the prompt's tokens among the keys,
    and of the image tokens among the queries; None if there are none, or if they differ between
    rows: then ``spans`` has (text, image) for each row. ``tokens``: number of image queries.
    ``conditioned``: for each row, whether it carries the prompt. ``negative``: positions of NAG's
    negative text among the keys (and among the queries of joint layers). ``twins``: pairs (row, its
    copy that carries NAG's negative text).
    """

    layer: str
    kind: Literal["self", "cross", "joint"]
    text: slice | None = None
    tokens: int = 0
    image: slice | None = None
    negative: slice | None = None
    conditioned: tuple[bool, ...] = ()
    spans: tuple[tuple[slice, slice], ...] | None = None
    twins: tuple[tuple[int, int], ...] = ()


@runtime_checkable
class Reward(Protocol):
    """``reward(images [B, 3, H, W] in [0, 1], prompts) -> [B]``, higher is better."""

    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class Sampler(Protocol):
    """A trajectory in segments; works inside a session, so techniques stay active."""

    def start(self, noise: Tensor) -> Any: ...
    def run(self, state: Any, first: int, last: int) -> Any: ...
    def preview(self, state: Any) -> Tensor: ...
    def decode(self, state: Any) -> Tensor: ...
    def render(self, noise: Tensor, grad: bool = False) -> Tensor: ...


class Search(Protocol[S]):
    """Anything that spends a budget on candidates; noise optimisers are searches over initial
    noises."""

    def init(self, problem: Any, rng: torch.Generator) -> S: ...
    def step(self, problem: Any, state: S) -> tuple[S, Mapping[str, Any]]: ...
    def best(self, state: S) -> Any: ...
