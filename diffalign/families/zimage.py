"""Z-Image: padded text behind the image in one attention, lists of rows, time runs to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffalign.core import UnsupportedModel
from diffalign.core.attention import Parts
from diffalign.families.arithmetic import backwards
from diffalign.families.family import Family, PipelineOption
from diffalign.families.layout import Grid
from diffalign.families.text import Argument, Encoder, SecondText, TextLayers, always

if TYPE_CHECKING:
    from torch import Tensor

# both of its sequences are padded to multiples of this
MULTIPLE = 32


def mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``cond + s * (cond - uncond)`` in float32 with s = scale - 1."""
    cond, uncond = cond.float(), uncond.float()
    return cond + (scale - 1.0) * (cond - uncond)


def cap(guided: Tensor, cond: Tensor, limit: Any) -> Tensor:
    """Each image's norm is at most ``limit`` times the conditional's."""
    import torch

    if not limit or not float(limit) > 0.0:
        return guided
    axes = list(range(1, guided.ndim))
    before = torch.linalg.vector_norm(cond.float(), dim=axes, keepdim=True)
    after = torch.linalg.vector_norm(guided, dim=axes, keepdim=True)
    ceiling = before * float(limit)
    return torch.where(after > ceiling, guided * (ceiling / after), guided)


def truncated(limit: Any, index: int, count: int, time: float) -> bool:
    return limit is not None and limit <= 1 and (1000.0 - time) / 1000.0 > limit


def to_step(guided: Tensor, arrival: Tensor) -> Tensor:
    """Negated, without the axis of frames."""
    return -guided.squeeze(2)


def padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def row_parts(denoiser: Any, call: Mapping[str, Any]) -> tuple[Parts, ...]:
    """Each row's image comes first, both parts padded."""
    patch, frames = int(call.get("patch_size", 2)), int(call.get("f_patch_size", 1))
    rows = []
    for x, text in zip(call["x"], call["cap_feats"]):
        if isinstance(x, list):
            raise UnsupportedModel(
                "Attention techniques do not act on Z-Image with reference images (nested lists of "
                "latents)."
            )
        depth, height, width = x.shape[-3:]
        image = padded(depth // frames * (height // patch) * (width // patch))
        rows.append({"prompt": slice(image, image + padded(len(text))), "image": slice(0, image)})
    return tuple(rows)


def grid(denoiser: Any, call: Mapping[str, Any]) -> Grid:
    """Latents [C, T, H, W] in a list, in patches of the call."""
    patch, depth = int(call.get("patch_size", 2)), int(call.get("f_patch_size", 1))
    frames, height, width = call["x"][0].shape[-3:]
    return frames // depth, height // patch, width // patch


def without_controlnet(pipe: Any) -> str | None:
    if getattr(pipe, "controlnet", None) is None:
        return None
    return "its ControlNet's residuals have the length of one text"


ZIMAGE = Family(
    "z-image",
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    order="cu",
    on_above=0.0,
    off=0.0,
    offset=1.0,
    live_scale=True,
    lists=True,
    grid=grid,
    mix=mix,
    to_step=to_step,
    target_sign=-1,
    time=backwards,
    options=(
        PipelineOption("cfg_normalization", False, post=cap),
        PipelineOption("cfg_truncation", 1.0, stops=truncated),
    ),
    text=(Argument("cap_feats", axis=0),),  # a list with a tensor [L, E] per row
    encoder=Encoder(arguments={"prompt_embeds": "cap_feats"}),
    attention=TextLayers(r"layers\.\d+\.attention", "joint", text="last", row_parts=row_parts),
    second_text=SecondText(in_rows=always, check=without_controlnet),
    # its refiners prepare one stream for the others and are not listed
    blocks={"ZImageTransformerBlock": ("x",)},
)
