"""The result of a pipeline call as one tensor, whatever the pipeline wraps it in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from diffalign.core.types import Pipeline


def final(pipe: Pipeline, inputs: Mapping[str, object]) -> Tensor:
    """``pipe(**inputs)`` without a progress bar, its images or frames as one tensor.

    Generators in ``inputs`` advance.
    """
    pipe.set_progress_bar_config(disable=True)
    result = pipe(**inputs)
    value = result[0] if isinstance(result, tuple) else getattr(result, "images", None)
    if value is None:
        value = result.frames
    if isinstance(value, list):
        value = np.stack([np.asarray(item) for item in value])
    return torch.as_tensor(value)
