"""PLADIS: dense-sparse cross-attention (Kim and Sim 2025, arXiv:2503.07677)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from diffalign.core import Tensor, Windowed
from diffalign.core.checks import check_choice, check_scale
from diffalign.core.option import check_options
from diffalign.kernels.pladis import PladisCall, choose, pladis_joint
from diffalign.seams.attention.base import AttentionTechnique, Site, check_layers, matches
from diffalign.seams.attention.intercept import put, take

if TYPE_CHECKING:
    from diffalign.seams.attention.intercept import Attend


@dataclass(frozen=True, slots=True)
class PLADIS(Windowed, AttentionTechnique):
    """Text attention weights ``softmax + strength * (entmax - softmax)``: extrapolated from dense
    towards sparse attention.

    ``strength``: 0 is off, 1 purely sparse, more extrapolates. ``alpha``: 1.5 (entmax) or 2
    (sparsemax). ``branches``: "both" rows of guidance (as in a public port of the authors' code) or
    "cond". ``layers``: patterns of layer names, None for every text layer (best in the paper's
    ablation). ``sigma`` or ``start``/``stop``: when it acts. Joint attention: image rows re-weigh
    their text keys and keep the mass they had on text, the pattern of third-party ports of the
    authors' Flux code; the paper describes cross-attention.
    Cost: no extra pass, but time: 11 to 22% per step on SDXL in the paper's own measurement (table
    5).
    """

    strength: float = 2.0  # the value in the source of the authors' project page
    _: KW_ONLY
    alpha: float = 1.5
    branches: Literal["both", "cond"] = "both"
    layers: tuple[str, ...] | None = None

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_scale("PLADIS", self.strength, "strength")
        if self.strength is None:
            raise ValueError("PLADIS(strength=...) must be a finite number; got None.")
        if self.alpha not in (1.5, 2.0):
            raise ValueError(
                f"PLADIS(alpha=...) must be 1.5 (entmax) or 2 (sparsemax); got {self.alpha!r}."
            )
        check_choice("PLADIS", "branches", self.branches, ("both", "cond"))
        check_layers("PLADIS", self.layers)
        check_options(self)
        self.check_window()

    @property
    def off(self) -> bool:
        return self.strength == 0

    def selects(self, site: Site) -> bool:
        return site.kind != "self" and matches(self.layers, site.layer)

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        rows = [
            i
            for i, conditioned in enumerate(site.conditioned)
            if conditioned or self.branches == "both"
        ]
        if not rows:
            return attend(q, k, v)
        if len(rows) == len(site.conditioned):
            return self._sharpen(attend, q, k, v, site)
        part = replace(
            site,
            conditioned=(True,) * len(rows),
            spans=site.spans and tuple(site.spans[i] for i in rows),
        )
        sharp = self._sharpen(
            attend.narrow(part, rows), take(q, rows), take(k, rows), take(v, rows), part
        )
        other = [i for i in range(len(site.conditioned)) if i not in rows]
        rest = replace(
            site,
            conditioned=(False,) * len(other),
            spans=site.spans and tuple(site.spans[i] for i in other),
        )
        plain = attend.narrow(rest, other)(take(q, other), take(k, other), take(v, other))
        return put(put(q.new_empty((*q.shape[:-1], v.shape[-1])), rows, sharp), other, plain)

    def _sharpen(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "cross":
            call = self._kernel(attend, q, k, attend.mask)
            return call(
                q,
                k,
                v,
                strength=self.strength,
                alpha=self.alpha,
                mask=attend.mask,
                scale=attend.scale,
            )
        if site.text is not None and site.image is not None:
            return self._joint(attend, q, k, v, site.text, site.image)
        assert site.spans is not None
        parts = []
        for i, (text, image) in enumerate(site.spans):
            one = replace(
                site, text=text, image=image, conditioned=site.conditioned[i : i + 1], spans=None
            )
            row = slice(i, i + 1)
            parts.append(self._joint(attend.narrow(one, [i]), q[row], k[row], v[row], text, image))
        return torch.cat(parts)

    def _joint(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, text: slice, image: slice
    ) -> Tensor:
        mask = attend.mask
        if mask is not None and mask.ndim >= 2 and mask.shape[-2] > 1:
            mask = mask[
                ..., image.start : image.start + 1, :
            ]  # the same for every image query in all families
        shown = mask if mask is None else mask[..., text]
        call = self._kernel(attend, q[..., image, :], k[..., text, :], shown)
        return pladis_joint(
            q,
            k,
            v,
            text=text,
            image=image,
            strength=self.strength,
            alpha=self.alpha,
            mask=mask,
            scale=attend.scale,
            attend=attend,
            call=call,
        )

    def _kernel(self, attend: Attend, q: Tensor, k: Tensor, mask: Tensor | None) -> PladisCall:
        layout = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
        key = (q.device, q.dtype, q.shape[-1], k.shape[-2], layout)
        call: PladisCall = attend.kernel("PLADIS", key, lambda: choose(q, k, mask))
        return call
