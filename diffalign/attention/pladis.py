"""PLADIS: dense-sparse cross-attention (Kim and Sim 2025, arXiv:2503.07677)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal

import torch

from diffalign.core import Attend, AttentionTechnique, Site, Tensor, Windowed, option
from diffalign.kernels.pladis import PladisCall, choose, pladis_joint
from diffalign.seams.attention.intercept import put, take


@dataclass(frozen=True, slots=True)
class PLADIS(Windowed, AttentionTechnique):
    """Text attention extrapolated from dense towards sparse weights.

    The weights are ``softmax + strength * (entmax - softmax)``. Joint attention: image rows
    re-weigh their text keys and keep the mass they had on text, the pattern of third-party ports of
    the authors' Flux code; the paper describes cross-attention.
    Cost: no extra pass, but time: 11 to 22% per step on SDXL in the paper's own measurement (table
    5).
    """

    # the value in the source of the authors' project page
    strength: float = option(2.0, "0 is off, 1 purely sparse, more extrapolates", usual=(0.0, 3.0))
    _: KW_ONLY
    alpha: float = option(1.5, "1.5 is entmax, 2 sparsemax", choices=(1.5, 2.0))
    branches: Literal["both", "cond"] = option(
        "both",
        "rows of guidance on which it acts: both, as in a public port of the authors' code, or "
        "those with the prompt",
    )
    layers: tuple[str, ...] | None = option(
        None,
        "patterns of layer names with *; none is every text layer, best in the paper's ablation",
        nonempty=True,
    )

    order: ClassVar[int] = 1

    @property
    def off(self) -> bool:
        return self.strength == 0

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
        part = _rows(site, rows)
        sharp = self._sharpen(
            attend.narrow(part, rows), take(q, rows), take(k, rows), take(v, rows), part
        )
        other = [i for i in range(len(site.conditioned)) if i not in rows]
        below = attend.narrow(_rows(site, other), other)
        plain = below(take(q, other), take(k, other), take(v, other))
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
        if not site.row_parts:
            return self._joint(attend, q, k, v, site.keys["prompt"], site.parts["image"])
        outputs = []
        for i, parts in enumerate(site.row_parts):
            below = attend.narrow(_rows(site, [i]), [i])
            q1, k1, v1 = q[i : i + 1], k[i : i + 1], v[i : i + 1]
            outputs.append(self._joint(below, q1, k1, v1, parts["prompt"], parts["image"]))
        return torch.cat(outputs)

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


def _rows(site: Site, rows: Sequence[int]) -> Site:
    """The layer as it is with some of its rows."""
    parts = tuple(site.row_parts[row] for row in rows) if site.row_parts else ()
    same = parts[:1] * len(rows) == parts
    return replace(
        site,
        parts=parts[0] if parts and same else site.parts,
        row_parts=() if same else parts,
        conditioned=tuple(site.conditioned[row] for row in rows),
    )
