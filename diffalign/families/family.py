"""What a family says about a pipeline class: everything the tap must know, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.core import linear_mix
from diffalign.core.presets import Entry
from diffalign.core.types import Mix

# (guided, conditional, value of the call argument) -> guided, both [B, ...]
Post = Callable[[Tensor, Tensor, Any], Tensor]


def renorm(guided: Tensor, cond: Tensor, on: Any) -> Tensor:
    """Scale each token of ``guided`` back to the norm of ``cond`` along the last axis (Qwen-Image,
    Lumina2)."""
    if not on:
        return guided
    shrunk: Tensor = guided * (
        torch.norm(cond, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
    )
    return shrunk


def rescale(guided: Tensor, cond: Tensor, phi: Any) -> Tensor:
    """Lin et al.

    2023 (arXiv:2305.08891, eq. 15-16), in the order of operations of diffusers'
    ``rescale_noise_cfg``.
    """
    if not phi > 0.0:
        return guided
    axes = list(range(1, cond.ndim))
    scaled = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    mixed: Tensor = phi * scaled + (1 - phi) * guided
    return mixed


@dataclass(frozen=True, slots=True)
class Argument:
    """A text argument of the denoiser: ``name``, sequence ``axis``, the ``mask`` argument that goes
    with it."""

    name: str
    axis: int = 1
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class PipelineOption:
    """A call argument through which the pipeline changes its own guidance: read, set to
    ``neutral``, applied by us instead.

    ``post`` runs on the guided rows after the technique; ``stops(value, index, steps, time)`` says
    that guidance is over at this step.
    """

    name: str
    neutral: Any
    post: Post | None = None
    stops: Callable[[Any, int, int, float], bool] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One pipeline family.

    ``mode``: "batched" (one call with both branches), "sequential" (two calls, conditional first)
    or "single". ``order``: branch order of the batch, "uc" or "cu". ``gates``: call argument with
    the scale of each denoiser; guidance runs natively while it is above ``on_above``. ``off``: native
    value that turns guidance off. ``offset``: our scale minus the native one.
    ``needs_negative``: the branch exists only with a negative prompt. ``placeholder``: native scale while
    our guidance runs. ``mix``: the pipeline's own arithmetic. ``affine``: the pipeline maps each
    prediction before combining them. ``to_step``: guided prediction -> what ``scheduler.step``
    receives. ``time``: denoiser timestep -> scheduler timestep. ``companions``: networks that run
    before the denoiser on the same rows; they skip what it skips. ``target_sign``: -1 where the network
    predicts the negated target. ``parametrisation``: parametrisation, "scheduler" reads its config. ``check``:
    a reason why this pipeline object has nothing to guide. ``lists``: tensors come as Python lists
    of rows. ``shared``: arguments never split by rows. ``refuses``: call argument -> reason.
    ``text``, ``encode``: for attention techniques.
    """

    name: str
    denoisers: tuple[str, ...] = ("transformer",)
    mode: Literal["batched", "sequential", "single"] = "batched"
    order: Literal["uc", "cu"] = "uc"
    gates: tuple[str, ...] = ("guidance_scale",)
    on_above: float = 1.0
    off: float = 1.0
    placeholder: float = 2.0
    offset: float = 0.0
    needs_negative: bool = False
    mix: Mix = linear_mix
    options: tuple[PipelineOption, ...] = ()
    affine: bool = False
    to_step: Callable[[Tensor, Tensor], Tensor] = field(default=lambda guided, like: guided)
    time: Callable[[float, Any], float] = field(default=lambda value, pipe: value)
    sigma: Callable[[float], float] = field(default=lambda value: value)
    target_sign: int = 1
    companions: tuple[str, ...] = ("controlnet",)
    parametrisation: Literal["scheduler", "flow"] = "scheduler"
    lists: bool = False
    shared: tuple[str, ...] = (
        "img_ids",
        "txt_ids",
        "image_rotary_emb",
        "attention_kwargs",
        "joint_attention_kwargs",
    )
    refuses: Mapping[str, str] = field(default_factory=dict)
    text: tuple[Argument, ...] = (Argument("encoder_hidden_states"),)
    encode: Callable[[Any, Sequence[str]], dict[str, Tensor]] | None = None
    check: Callable[[Any], str | None] = field(default=lambda pipe: None)
    defaults: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def scale(self, native: float | None) -> float:
        """Our guidance scale for the pipeline's own; 1 where the pipeline does not guide."""
        return native + self.offset if native is not None and native > self.on_above else 1.0

    def native(self, scale: float) -> float:
        """The pipeline's own guidance scale for ours."""
        return self.off if scale == 1.0 else scale - self.offset

    def negative_given(self, pipe: Any, value: Mapping[str, Any]) -> bool:
        """Whether the call carries what the pipeline's own gate asks for besides the scale."""
        if not self.needs_negative:
            return True
        return any(
            value.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds")
        )

    def missing_negative(self, pipe: Any, value: Mapping[str, Any]) -> str | None:
        """Why the unconditional branch cannot be formed, None when it can."""
        if value.get("prompt_embeds") is None or value.get("negative_prompt_embeds") is not None:
            return None
        encoders = [
            getattr(pipe, name, None)
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        ]
        if any(encoder is not None for encoder in encoders):
            return None
        return "guidance needs the unconditional branch; pass negative_prompt_embeds (there is no text encoder to make them)."


# to_step maps: `like` is what arrived at scheduler.step


def same(guided: Tensor, like: Tensor) -> Tensor:
    return guided


def negated(guided: Tensor, like: Tensor) -> Tensor:
    return -guided


def first_channels(guided: Tensor, like: Tensor) -> Tensor:
    """Models that also predict a variance: the scheduler gets the first channels."""
    return guided[:, : like.shape[1]]
