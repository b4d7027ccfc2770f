"""Adaptive projected guidance (Sadat, Hilliges and Weber 2024, arXiv:2410.02416, algorithm 1)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

import torch

from diffalign.core import COND, UNCOND, Context, Pass, Space, StepInfo, Tensor
from diffalign.core.checks import check_range, check_scale, rowwise
from diffalign.core.presets import preset
from diffalign.guidance.base import Guidance


@dataclass(frozen=True, slots=True)
class APGState:
    """Running difference before step ``index`` (``past``) and after it (``latest``), each ``[B,
    ...]`` in float32 or None at the start."""

    index: int = -1
    past: Tensor | None = None
    latest: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "APGState":
        """The state of those images."""
        past, latest = (
            None if value is None else value[list(rows)] for value in (self.past, self.latest)
        )
        return APGState(self.index, past, latest)


@dataclass(frozen=True, slots=True)
class APG(Guidance[APGState]):
    """CFG on denoised images with the part of the update that is parallel to the conditional image
    weakened (arXiv:2410.02416).

    ``m <- (cond - uncond) + momentum * m``, capped at norm ``cap``, split along ``cond``; the
    result is ``cond + (scale - 1) * (orthogonal + eta * parallel)``: high scales without
    over-saturation. ``scale``: 1 is off, None the pipeline's own value (the paper uses 15 for SDXL,
    10 for SD 2.1). ``eta``: weight of the parallel part, 1 keeps it. ``cap``: largest norm of an
    image's difference, ``inf`` for none. ``momentum``: negative values turn against the last steps'
    direction, 0 is none. ``cap`` and ``momentum`` of None are looked up for the model
    (``presets.json``). With eta 1, no cap and no momentum it is CFG up to rounding. The momentum is
    kept before the cap, and a solver's second evaluation of a step starts from the same momentum as
    its first. Norms are over all values of an image.
    Cost: 2 passes per step and one latent of memory; 1 pass at scale 1.
    """

    combine_space: ClassVar[Space] = "x0"
    scale: float | None = None
    _: KW_ONLY
    eta: float = 0.0
    cap: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_scale("APG", self.scale)
        check_scale("APG", self.eta, "eta")
        if self.cap is not None and not self.cap > 0.0:
            raise ValueError(
                "APG(cap=...) must be a positive number, inf for no cap, or None for the model's "
                f"preset; got {self.cap!r}."
            )
        if self.momentum is not None:
            check_range("APG", "momentum", self.momentum, -1.0, 1.0)

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        made, sources = Guidance.resolve(self, context)
        facts = context.facts() | {"scale": made.scale}
        if made.cap is None:
            value, sources["cap"] = preset("apg", "cap", facts, context.defaults.get("apg", ()))
            made = dataclasses.replace(made, cap=math.inf if value == "none" else value)
        if made.momentum is None:
            value, sources["momentum"] = preset(
                "apg", "momentum", facts, context.defaults.get("apg", ())
            )
            made = dataclasses.replace(made, momentum=value)
        return made, sources

    def init(self, batch: int) -> APGState:
        return APGState()

    def passes(self, step: StepInfo, state: APGState) -> tuple[Pass, ...]:
        return (COND,) if self.scale == 1.0 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: APGState
    ) -> tuple[Tensor, APGState]:
        cond, uncond = preds[COND], preds.get(UNCOND)
        if uncond is None:
            return cond, state
        assert self.scale is not None
        assert self.cap is not None
        assert self.momentum is not None
        past = state.past if state.index == step.index else state.latest
        moved = cond - uncond
        if past is not None and self.momentum != 0.0:
            moved = moved + self.momentum * past
        latest = moved if step.evaluation == 0 else state.latest
        unit = torch.nn.functional.normalize(rowwise(cond), dim=1)
        difference = rowwise(moved)
        if self.cap < math.inf:
            norm = difference.norm(dim=1, keepdim=True)
            difference = difference * (self.cap / norm.clamp_min(1e-30)).clamp_max(1.0)
        parallel = (difference * unit).sum(1, keepdim=True) * unit
        update = difference - (1.0 - self.eta) * parallel
        guided = cond + (self.scale - 1.0) * update.reshape(cond.shape).to(cond.dtype)
        return guided, APGState(step.index, past, latest)
