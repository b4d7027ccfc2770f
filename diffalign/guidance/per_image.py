"""Arithmetic with one number per image: what to measure of a prediction, and how to mix with it."""

import torch

from diffalign.core import StepInfo, Tensor


def rowwise(x: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, n]`` in float32: every axis but the rows flattened."""
    return x.flatten(1).float()


def latent(prediction: Tensor, step: StepInfo) -> Tensor:
    """``prediction`` as ``[B, n]`` in float32, without the channels of a learned variance.

    The first row is converted to learn the latent's shape, because ``step.convert`` knows it and a
    technique does not.
    """
    shape = step.convert(prediction[:1], "native", "eps", (0,)).shape
    return rowwise(prediction[(slice(None), *map(slice, shape[1:]))])


def wide(prediction: Tensor) -> Tensor:
    """``prediction`` in float32, or in its own dtype if that is wider."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def column(values: Tensor, prediction: Tensor) -> Tensor:
    """``values [B]`` shaped to multiply ``prediction [B, ...]``."""
    return values.reshape(-1, *(1,) * (prediction.ndim - 1))


def mix_rows(step: StepInfo, cond: Tensor, uncond: Tensor, weight: Tensor) -> Tensor:
    """Guidance with one ``weight [B]`` per image, mixed in float32, in the dtype of ``cond``."""
    return step.mix(wide(cond), wide(uncond), column(weight, cond)).to(cond.dtype)
