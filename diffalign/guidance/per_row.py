"""Shared by techniques whose weight differs per image: when both branches run, what to measure, and
how to mix with it."""

from collections.abc import Mapping

import torch

from diffalign.core import COND, UNCOND, Pass, StepInfo, Tensor
from diffalign.core.checks import rowwise
from diffalign.guidance.base import Guidance


class BothBranches(Guidance[None]):
    """A rule on both predictions, ``guide``; at ``scale`` 1 it is off, and the conditional branch
    runs alone."""

    __slots__ = ()
    scale: float | None

    @property
    def needs_uncond(self) -> bool:
        return self.scale != 1.0

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return (COND,) if self.scale == 1.0 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        cond, uncond = preds[COND], preds.get(UNCOND)
        if uncond is None:
            return cond, None
        assert self.scale is not None
        return self.guide(cond, uncond, self.scale, step), None

    def guide(self, cond: Tensor, uncond: Tensor, scale: float, step: StepInfo) -> Tensor:
        """The guided prediction from both, ``[B, ...]``."""
        raise NotImplementedError


def latent(prediction: Tensor, step: StepInfo) -> Tensor:
    """``prediction`` as ``[B, n]`` in float32, without what is not part of the latent (the channels
    of a learned variance).

    The first row is converted to learn the latent's shape, because ``step.convert`` knows it and a
    technique does not.
    """
    shape = step.convert(prediction[:1], "native", "eps", (0,)).shape
    return rowwise(prediction[(slice(None), *map(slice, shape[1:]))])


def wide(prediction: Tensor) -> Tensor:
    """``prediction`` in float32, or in its own dtype if that is wider."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def column(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]`` shaped to multiply ``like [B, ...]``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def mix_rows(step: StepInfo, cond: Tensor, uncond: Tensor, weight: Tensor) -> Tensor:
    """Guidance with one ``weight [B]`` per image, mixed in float32, in the dtype of ``cond``."""
    return step.mix(wide(cond), wide(uncond), column(weight, cond)).to(cond.dtype)
