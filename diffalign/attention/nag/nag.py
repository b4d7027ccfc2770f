"""Normalised attention guidance, NAG (Chen et al. 2025, arXiv:2505.21179, eq. 7-10)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from diffalign.attention.nag import two_texts
from diffalign.attention.nag.text import NegativeStream, refusal
from diffalign.core import Context, Tensor, Windowed
from diffalign.core.checks import check_choice, check_range, check_scale
from diffalign.core.option import Option, check_options
from diffalign.families import family_of
from diffalign.kernels.nag import NagCall, choose
from diffalign.seams.attention.base import AttentionTechnique, Site, check_layers, matches
from diffalign.seams.swap import original_class

if TYPE_CHECKING:
    from diffalign.seams.attention.intercept import Attend
    from diffalign.seams.denoiser.tap import Generation


TAU_LIMIT = 1e6  # beyond any growth: no limit


@dataclass(frozen=True, slots=True)
class NAG(Windowed, AttentionTechnique):
    """A negative prompt inside attention, at one denoiser call per step, with or without
    classifier-free guidance.

    Each text layer attends with the prompt and with the negative text; the image tokens ``z`` [B,
    N, E] are pushed from the second towards the first, their growth limited to ``tau`` per token
    and blended with ``alpha``. ``scale``: 1 is off. It is s = phi + 1 where the paper's tables give
    phi; the authors' code also uses s, some ports use phi. ``tau`` in [1, 1e6], ``alpha`` in [0,
    1], ``scale``, and the window: None takes the family's published value, which the report names.
    ``negative_prompt``: one text, or one per prompt; None takes the call's
    ``negative_prompt_embeds``, else its ``negative_prompt``, else "". ``negative_embeds``: the
    negative text already encoded, under the pipeline's own names: ``negative_prompt_embeds`` and
    the mask and pooled embeddings that go with it (not saved in settings). ``norm``: "l1" (paper)
    or "l2" (first Flux release, for old images). ``layers``: patterns of layer names.
    ``share_image``: one image stream serves both texts. False follows the published Flux layout,
    which runs a second image stream in the single blocks, modulated with the negative pooled text.
    Differs from the paper: on models with pooled text the negative text tokens are modulated with
    the prompt's pooled text.
    Cost: no extra pass; the negative text's tokens at every layer, and a second row per guided
    image on Lumina2, Z-Image, CogVideoX, Wan 2.1 image-to-video, and with ``share_image=False``.
    """

    scale: float | None = None
    _: KW_ONLY
    tau: float | None = None
    alpha: float | None = None
    negative_prompt: str | tuple[str, ...] | None = None
    negative_embeds: Mapping[str, Any] | None = field(
        default=None,
        compare=False,
        repr=False,
        metadata={"tensors": True, "option": Option(saved="tensors")},
    )
    norm: Literal["l1", "l2"] = "l1"
    layers: tuple[str, ...] | None = None
    share_image: bool = True

    order: ClassVar[int] = 0
    everywhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_scale("NAG", self.scale)
        if self.tau is not None:
            check_range("NAG", "tau", self.tau, 1.0, TAU_LIMIT)
        if self.alpha is not None:
            check_range("NAG", "alpha", self.alpha, 0.0, 1.0)
        check_choice("NAG", "norm", self.norm, ("l1", "l2"))
        check_layers("NAG", self.layers)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            texts = self.negative_prompt
            if (
                not isinstance(texts, Sequence)
                or not texts
                or not all(isinstance(text, str) for text in texts)
            ):
                raise TypeError(
                    "NAG(negative_prompt=...) must be a text, a tuple of texts or None; got "
                    f"{texts!r}."
                )
            object.__setattr__(self, "negative_prompt", tuple(texts))
        if self.negative_embeds is not None:
            if (
                not isinstance(self.negative_embeds, Mapping)
                or "negative_prompt_embeds" not in self.negative_embeds
            ):
                raise TypeError(
                    "NAG(negative_embeds=...) must map the pipeline's names to tensors, "
                    "{'negative_prompt_embeds': ...}; "
                    f"got {type(self.negative_embeds).__name__}."
                )
            if self.negative_prompt is not None:
                raise ValueError("NAG takes negative_prompt or negative_embeds, not both.")
        check_options(self)
        self.check_window()

    @property
    def off(self) -> bool:
        return self.scale == 1.0 or self.alpha == 0.0

    @property
    def reads_negative(self) -> bool:
        """Whether it takes the call's negative prompt, so that nobody need be told that it has no
        effect."""
        return not self.off and self.negative_prompt is None and self.negative_embeds is None

    def selects(self, site: Site) -> bool:
        return site.kind != "self" and matches(self.layers, site.layer)

    def refuses(self, context: Context) -> str | None:
        family = family_of(original_class(context.pipe))
        return super(NAG, self).refuses(context) or refusal(context.pipe, family, self.share_image)

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        options = [name for name in ("scale", "tau", "alpha") if getattr(self, name) is None]
        values = {name: context.look_up(name, f"nag/{name}") for name in options}
        if self.sigma is None and (self.start, self.stop) == (0.0, 1.0):
            with suppress(LookupError):  # without a published window it acts at every step
                values["sigma"] = context.look_up("sigma", "nag/sigma")
        return replace(self, **values), context.sources

    def stream(self, run: Generation) -> NegativeStream:
        return NegativeStream(self, run)

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        guide = functools.partial(self._guide, attend) if self.selects(site) else None
        if site.twins:  # in the double blocks the published layout has one image stream
            one_image = not self.share_image and not site.layer.startswith("single_")
            return two_texts.twins(attend, q, k, v, site, guide, one_image)
        if site.negative is None:
            return attend(q, k, v)
        return (two_texts.cross if site.kind == "cross" else two_texts.joint)(
            attend, q, k, v, site, guide
        )

    def _guide(self, attend: Attend, z: Tensor, away: Tensor) -> Tensor:
        """Eq. 7-10 on image tokens [B, A, N, D], one norm per token over all heads."""
        assert self.scale is not None
        assert self.tau is not None
        assert self.alpha is not None
        flat, other = (x.transpose(1, 2).flatten(2) for x in (z, away))
        call: NagCall = attend.kernel(
            "NAG", (flat.device, flat.dtype, flat.shape[-1]), lambda: choose(flat)
        )
        guided = call(flat, other, scale=self.scale, tau=self.tau, alpha=self.alpha, norm=self.norm)
        return guided.reshape(z.shape[0], z.shape[2], z.shape[1], z.shape[3]).transpose(1, 2)
