"""Normalised attention guidance, NAG (Chen et al. 2025, arXiv:2505.21179, eq. 7-10)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.attention.nag import two_texts
from diffalign.attention.nag.spared import NEGATIVE
from diffalign.attention.nag.text import NegativeText, refusal
from diffalign.core import (
    Attend,
    AttentionTechnique,
    Context,
    Site,
    Tensor,
    Windowed,
    auto,
    filled,
    option,
)
from diffalign.core.types import Pipeline
from diffalign.families import family_of
from diffalign.kernels.nag import NagCall, choose
from diffalign.seams.swap import original_class, unwrapped

if TYPE_CHECKING:
    from diffalign.seams.denoiser.tap import Generation


TAU_LIMIT = 1e6  # beyond any growth: no limit


@dataclass(frozen=True, slots=True)
class NAG(Windowed, AttentionTechnique):
    """A negative prompt inside attention, at one denoiser call per step, with or without guidance.

    Each text layer attends with the prompt and with the negative text; the image tokens ``z`` [B,
    N, E] are pushed from the second towards the first, their growth limited to ``tau`` per token
    and blended with ``alpha``. ``scale`` is s = phi + 1 where the paper's tables give phi; the
    authors' code also uses s, some ports use phi. Where the family has a published window, that is
    the default one.
    Differs from the paper: on models with pooled text the negative text tokens are modulated with
    the prompt's pooled text. On Flux the authors modulate with the negative pooled text:
    ``NAG(norm="l2", share_image=False)`` is their diffusers code, ``NAG(norm="l1",
    share_image=False)`` their ComfyUI code.
    Cost: no extra pass; the negative text's tokens at every layer, none where CFG's negative text
    is the same and layers attend to text alone, and a second row per guided image with
    ``share_image=False`` and where a model's texts cannot share one row.
    """

    scale: float = auto("nag/scale", "1 is off", usual=(1.0, 12.0))
    _: KW_ONLY
    tau: float = auto(
        "nag/tau", "how many times larger a token may grow", low=1.0, high=TAU_LIMIT, usual=(1, 5)
    )
    alpha: float = auto(
        "nag/alpha", "weight of the guided tokens beside the plain ones", low=0.0, high=1.0
    )
    negative_prompt: str | tuple[str, ...] | None = option(
        None,
        "one text, or one per prompt; none takes the call's negative_prompt_embeds, else its "
        "negative_prompt, else an empty text",
    )
    negative_embeds: Mapping[str, Any] | None = option(
        None,
        "the negative text already encoded, under the pipeline's own names: negative_prompt_embeds "
        "and the mask and pooled embeddings that go with it",
        saved="tensors",
    )
    norm: Literal["l1", "l2"] = option(
        "l1",
        "of a token: l1 is that of the paper and of the authors' ComfyUI code, l2 that of their "
        "diffusers code for Flux",
    )
    layers: tuple[str, ...] | None = option(
        None, "patterns of layer names with *; none is every text layer", nonempty=True
    )
    share_image: bool = option(
        True,
        "one image stream serves both texts, and no negative pooled text is used; false is the "
        "published layout of Flux: a second image stream in the single blocks, modulated with the "
        "negative pooled text",
    )

    order: ClassVar[int] = 0
    everywhere: ClassVar[bool] = True

    def check(self) -> None:
        Windowed.check(self)
        if self.negative_prompt == ():
            raise ValueError("NAG(negative_prompt=...) must have at least one text; got ().")
        embeds: Any = self.negative_embeds
        if embeds is None:
            return
        first = "negative_prompt_embeds"  # some families have the encoder's name behind it
        if not isinstance(embeds, Mapping) or not any(name.startswith(first) for name in embeds):
            raise TypeError(
                "NAG(negative_embeds=...) must map the pipeline's names to tensors, "
                f"{{'negative_prompt_embeds': ...}}; got {type(embeds).__name__}."
            )
        if self.negative_prompt is not None:
            raise ValueError("NAG takes negative_prompt or negative_embeds, not both.")

    @property
    def off(self) -> bool:
        return self.scale == 1.0 or self.alpha == 0.0

    @property
    def reads_negative(self) -> bool:
        return not self.off and self.negative_prompt is None and self.negative_embeds is None

    def refuses(self, context: Context) -> str | None:
        family = family_of(original_class(context.pipe))
        return refusal(context.pipe, family, self.share_image)

    def resolve(self, context: Context) -> Self:
        technique = filled(self, context)
        if self.sigma is None and (self.start, self.stop) == (0.0, 1.0):
            with suppress(LookupError):  # without a published window it acts at every step
                window = context.look_up("sigma", "nag/sigma")
                technique = dataclasses.replace(technique, sigma=window)
        return technique

    def repeats(self, pipe: Pipeline, denoiser: str) -> bool:
        second = family_of(original_class(pipe)).second_text
        module = unwrapped(getattr(pipe, denoiser))
        return not self.share_image or (second is not None and second.in_rows(module))

    def extension(self, generation: Generation) -> NegativeText:
        return NegativeText(self, generation)

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        guide = functools.partial(self._guide, attend) if self.selects(site) else None
        if site.copies:  # in the double blocks the published layout has one image stream
            one_image = not self.share_image and not site.layer.startswith("single_")
            return two_texts.two_rows(attend, q, k, v, site, guide, one_image)
        if site.negatives:
            return two_texts.borrowed(attend, q, k, v, site, guide)
        if NEGATIVE not in site.parts:
            return attend(q, k, v)
        return (two_texts.cross if site.kind == "cross" else two_texts.joint)(
            attend, q, k, v, site, guide
        )

    def _guide(self, attend: Attend, z: Tensor, away: Tensor) -> Tensor:
        """Eq. 7-10 on image tokens [B, A, N, D], one norm per token over all heads."""
        flat, other = (x.transpose(1, 2).flatten(2) for x in (z, away))
        call: NagCall = attend.kernel(
            "NAG", (flat.device, flat.dtype, flat.shape[-1]), lambda: choose(flat)
        )
        guided = call(flat, other, scale=self.scale, tau=self.tau, alpha=self.alpha, norm=self.norm)
        return guided.reshape(z.shape[0], z.shape[2], z.shape[1], z.shape[3]).transpose(1, 2)
