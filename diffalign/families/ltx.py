"""LTX-Video: cross-attention to masked text, both branches in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffalign.core import linear_mix
from diffalign.core.errors import UnsupportedModel
from diffalign.families.arithmetic import negated, upcast_mix
from diffalign.families.family import IMAGE, RESCALE, Family
from diffalign.families.layout import Grid
from diffalign.families.text import (
    CROSS,
    HIDDEN_MASKED,
    MASKED,
    SELF,
    TEXT_MASKED,
    Encoder,
    SecondText,
)

if TYPE_CHECKING:
    from torch import Tensor


def without_first_frame(guided: Tensor, arrival: Tensor) -> Tensor:
    """Image-to-video: tokens [B, T H W, C] as [B, C, T, H, W] without the frame of the image.

    Patches are of one latent.
    """
    b, c, t, h, w = arrival.shape
    return guided.reshape(b, t + 1, h, w, c).permute(0, 4, 1, 2, 3)[:, :, 1:]


def grid(denoiser: Any, arguments: Mapping[str, Any]) -> Grid:
    """Patches are of one latent; with given frames the sizes follow from the tokens' coordinates.

    Raises: ``UnsupportedModel`` where tokens of given frames stand before those of the video.
    """
    places = arguments.get("video_coords")
    if places is None:
        return arguments["num_frames"], arguments["height"], arguments["width"]
    frames, height, width = (len(axis.unique()) for axis in places[0])
    if frames * height * width != places.shape[-1]:
        raise UnsupportedModel(
            "LTX: tokens of given frames stand before those of the video, so the image tokens form "
            "no grid. Give frames at index 0, or use da.PAG instead."
        )
    return frames, height, width


LTX = Family(
    "ltx",
    live_scale=True,
    pipelines=("LTXPipeline",),
    mix=upcast_mix,
    packed=True,
    grid=grid,
    options=(RESCALE,),
    text=HIDDEN_MASKED,
    encoder=Encoder(MASKED, TEXT_MASKED),
    attention=CROSS,
    self_attention=SELF,
    second_text=SecondText(tokens=r"caption_projection"),
    blocks={"LTXVideoTransformerBlock": (IMAGE,)},
)


def releases(arguments: Mapping[str, Any]) -> list[float] | None:
    """Given tokens are held back until the noise has fallen to theirs: each has a time of its own
    [rows, tokens], the lower of the step's and that of its strength."""
    times = arguments["timestep"]
    if times.ndim < 2 or times.shape[1] == 1:
        return None
    values: list[float] = times[0].float().tolist()
    first = max(values)
    return None if min(values) == first else [math.inf if t == first else t for t in values]


CONDITION = replace(
    LTX, pipelines=("LTXConditionPipeline",), mix=linear_mix, to_step=negated, releases=releases
)


def later_frames(arguments: Mapping[str, Any]) -> slice:
    """Tokens of all frames but the first, which is the given image."""
    return slice(arguments["height"] * arguments["width"], None)


IMAGE_TO_VIDEO = replace(
    LTX,
    pipelines=("LTXImageToVideoPipeline",),
    to_step=without_first_frame,
    seen=later_frames,
)
