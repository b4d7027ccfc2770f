"""Which pipeline classes diffalign acts on, and how: one row per family, by exact class name; every
other class has its reason.

A row is a claim about a pipeline's source; each is identity-tested against the real pipeline
(``tests/seams/denoiser/test_identity.py``).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel, linear_mix
from diffalign.core.errors import nearest
from diffalign.families.encode import with_text
from diffalign.families.family import (
    Family,
    PipelineOption,
    first_channels,
    negated,
    renorm,
    rescale,
)


def upcast_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Pipelines that cast the prediction to float32 before mixing (Sana, LTX, CogVideoX)."""
    return linear_mix(cond.float(), uncond.float(), scale)


def shifted_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``cond + s * (cond - uncond)`` in float32 with s = scale - 1 (Z-Image)."""
    cond, uncond = cond.float(), uncond.float()
    return cond + (scale - 1.0) * (cond - uncond)


def plain_shifted_mix(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``cond + s * (cond - uncond)`` with s = scale - 1 (Cosmos)."""
    return cond + (scale - 1.0) * (cond - uncond)


def cap(guided: Tensor, cond: Tensor, limit: Any) -> Tensor:
    """Z-Image's ``cfg_normalization``: each image's norm is at most ``limit`` times the
    conditional's."""
    if not limit or not float(limit) > 0.0:
        return guided
    axes = list(range(1, guided.ndim))
    before = torch.linalg.vector_norm(cond.float(), dim=axes, keepdim=True)
    after = torch.linalg.vector_norm(guided, dim=axes, keepdim=True)
    ceiling = before * float(limit)
    return torch.where(after > ceiling, guided * (ceiling / after), guided)


def twice_first_channels(guided: Tensor, like: Tensor) -> Tensor:
    """DiT hands the scheduler every row it ran, both halves under guidance, without the variance
    channels."""
    both = guided if guided.shape[0] == like.shape[0] else torch.cat([guided, guided])
    return both[:, : like.shape[1]]


def first_tokens(guided: Tensor, like: Tensor) -> Tensor:
    """Editing models also predict the tokens of the reference image; the scheduler gets the first
    ones."""
    return guided[:, : like.shape[1]]


def without_first_frame(guided: Tensor, like: Tensor) -> Tensor:
    """LTX image-to-video: tokens ``[B, T H W, C]`` as ``[B, C, T, H, W]`` without the first, given
    frame (patches of one latent)."""
    b, c, t, h, w = like.shape
    return guided.reshape(b, t + 1, h, w, c).permute(0, 4, 1, 2, 3)[:, :, 1:]


def half_rescale(guided: Tensor, cond: Tensor, phi: Any) -> Tensor:
    """Hunyuan-DiT rescales after it has dropped the variance channels."""
    half = guided.shape[1] // 2
    return (
        torch.cat((rescale(guided[:, :half], cond[:, :half], phi), guided[:, half:]), dim=1)
        if phi
        else guided
    )


def _embedded_guidance(pipe: Any) -> str | None:
    return "guidance is distilled into the model (guidance_scale is an input): there is no unconditional branch to guide with; use NAG."


def _distilled_unet(pipe: Any) -> str | None:
    if getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None:
        return "this U-Net is guidance-distilled (time_cond_proj_dim is set): there is no unconditional branch to guide with; use NAG."
    return None


def _per_thousand(value: float, pipe: Any) -> float:
    return value * 1000.0


def _reversed(value: float, pipe: Any) -> float:
    return (1.0 - value) * 1000.0


SKIP_LAYER = {
    "skip_guidance_layers": (
        "the pipeline's own skip-layer call would be mixed with the guided result; use "
        "da.SkipLayerGuidance."
    )
}
DYNAMIC = {"use_dynamic_cfg": "the pipeline would change the scale by itself; use da.ScheduledCFG."}
RESCALE = (PipelineOption("guidance_rescale", 0.0, post=rescale),)

SD = Family("sd", denoisers=("unet",), options=RESCALE, check=_distilled_unet)
SDXL = Family("sdxl", denoisers=("unet",), options=RESCALE, check=_distilled_unet)
SD3 = Family("sd3", refuses=SKIP_LAYER)
PIXART = Family("pixart", to_step=first_channels)
SANA = Family(
    "sana",
    mix=upcast_mix,
    to_step=first_channels,
    time=lambda value, pipe: value / float(pipe.transformer.config.timestep_scale),
)
FLUX = Family(
    "flux", mode="sequential", gates=("true_cfg_scale",), needs_negative=True, time=_per_thousand
)
QWEN = Family(
    "qwen",
    mode="sequential",
    gates=("true_cfg_scale",),
    needs_negative=True,
    time=_per_thousand,
    options=(PipelineOption("cfg_renorm", True, post=renorm),),
)
CHROMA = Family("chroma", mode="sequential", time=_per_thousand)
LUMINA2 = Family(
    "lumina2",
    mode="sequential",
    to_step=negated,
    target_sign=-1,
    time=_reversed,
    options=(
        PipelineOption("cfg_normalization", False, post=renorm),
        PipelineOption(
            "cfg_trunc_ratio",
            1.0,
            stops=lambda ratio, index, count, time: (index + 1) / count > ratio,
        ),
    ),
)
ZIMAGE = Family(
    "z-image",
    order="cu",
    on_above=0.0,
    off=0.0,
    offset=1.0,
    lists=True,
    mix=shifted_mix,
    to_step=lambda guided, like: -guided.squeeze(2),
    target_sign=-1,
    time=_reversed,
    options=(
        PipelineOption("cfg_normalization", False, post=cap),
        PipelineOption(
            "cfg_truncation",
            1.0,
            stops=lambda limit, index, count, time: (
                limit is not None and limit <= 1 and (1000.0 - time) / 1000.0 > limit
            ),
        ),
    ),
)
WAN = Family(
    "wan",
    denoisers=("transformer", "transformer_2"),
    gates=("guidance_scale", "guidance_scale_2"),
    mode="sequential",
)
LTX = Family("ltx", mix=upcast_mix, options=RESCALE)
COGVIDEOX = Family("cogvideox", mix=upcast_mix, refuses=DYNAMIC)
DIT = Family("dit", order="cu", to_step=twice_first_channels)
KOLORS = replace(SDXL, name="kolors")
HUNYUAN_DIT = Family(
    "hunyuan-dit",
    to_step=first_channels,
    options=(PipelineOption("guidance_rescale", 0.0, post=half_rescale),),
)
AURAFLOW = Family("auraflow", time=_per_thousand)
COGVIEW4 = Family("cogview4", mode="sequential")
FLUX_DISTILLED = Family(
    "flux", mode="single", gates=(), time=_per_thousand, check=_embedded_guidance
)
COSMOS2 = Family(
    "cosmos2",
    mode="sequential",
    affine=True,
    offset=1.0,
    mix=plain_shifted_mix,
    parametrisation="flow",
    sigma=lambda s: s / (1.0 + s),
    time=lambda value, pipe: 1000.0 * value / max(1.0 - value, 1e-6),
)

_FAMILIES: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (
        SD,
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
        ),
    ),
    (
        SDXL,
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
        ),
    ),
    (KOLORS, ("KolorsPipeline",)),
    (
        SD3,
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        ),
    ),
    (PIXART, ("PixArtAlphaPipeline", "PixArtSigmaPipeline")),
    (SANA, ("SanaPipeline", "SanaControlNetPipeline")),
    (HUNYUAN_DIT, ("HunyuanDiTPipeline",)),
    (AURAFLOW, ("AuraFlowPipeline",)),
    (
        FLUX,
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"),
    ),
    (replace(FLUX, to_step=first_tokens), ("FluxKontextPipeline", "FluxKontextInpaintPipeline")),
    (
        FLUX_DISTILLED,
        (
            "FluxFillPipeline",
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        ),
    ),
    (
        QWEN,
        (
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
        ),
    ),
    (replace(QWEN, to_step=first_tokens), ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")),
    (CHROMA, ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")),
    (LUMINA2, ("Lumina2Pipeline",)),
    (
        ZIMAGE,
        (
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
        ),
    ),
    (WAN, ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")),
    (
        replace(WAN, denoisers=("transformer",), gates=("guidance_scale",)),
        ("WanVideoToVideoPipeline",),
    ),
    (LTX, ("LTXPipeline",)),
    (replace(LTX, mix=linear_mix, to_step=negated), ("LTXConditionPipeline",)),
    (replace(LTX, to_step=without_first_frame), ("LTXImageToVideoPipeline",)),
    (
        COGVIDEOX,
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
    ),
    (COGVIEW4, ("CogView4Pipeline",)),
    (DIT, ("DiTPipeline",)),
    (COSMOS2, ("Cosmos2TextToImagePipeline",)),
)
FAMILIES: dict[str, Family] = {name: with_text(row) for row, names in _FAMILIES for name in names}


@cache
def refusals() -> dict[str, str]:
    """Exported pipeline classes without a row: class name -> reason."""
    table: dict[str, str] = json.loads(files(__package__).joinpath("refusals.json").read_text())
    return table


def family_of(cls: type) -> tuple[Family, bool]:
    """The row of a pipeline class, and whether a subclass inherited it.

    Raises ``UnsupportedModel`` with the specific reason.
    """
    for base in cls.__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__], base is not cls
        if base.__name__ in refusals():
            raise UnsupportedModel(f"{base.__name__} is not supported: {refusals()[base.__name__]}")
    raise UnsupportedModel(
        f"{cls.__name__} is not a pipeline class that diffalign knows. Nearest: "
        f"{nearest(cls.__name__, FAMILIES)}. "
        "A subclass of one of those inherits its row."
    )
