"""Loading published checkpoints so that none is ever half loaded without notice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from diffalign.core.identity import model_hash
from diffalign.core.types import Json, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, for images in [0, 1]."""


def pretrained(cls: type, name: str, device: str) -> Pipeline:
    """A model of transformers in float32, ready to be read from; ``name``: a folder or a hub id.

    Raises: ValueError where it cannot be read, or where weights are missing or have other shapes.
    """
    import torch
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # missing weights are an error below
    try:
        model, report = cls.from_pretrained(  # type: ignore[attr-defined]
            name, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"the scorer's model {name!r} cannot be read: {why}") from error
    finally:
        logger.setLevel(level)
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"{name!r} is not a checkpoint of {cls.__name__}: {len(missing)} weights are missing "
            f"or of another shape, first {missing[0]}."
        )
    return model.eval().requires_grad_(False).to(device)


def facts_of(name: str, model: Pipeline) -> Json:
    """Name and hash of a model."""
    return {"name": name, "revision": model_hash(model)}


def normalised(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """An image [3, H, W] minus ``mean``, divided by ``std``."""
    return (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]


def resized(image: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """An image [3, H, W] of another size, antialiased, in [0, 1]."""
    from torch.nn.functional import interpolate

    return interpolate(image[None], size=size, mode=mode, align_corners=False, antialias=True)[
        0
    ].clamp(0, 1)
