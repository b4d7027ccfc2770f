"""Perturbed-attention guidance: away from the same model whose image tokens do not see one
another."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch

from diffalign.core import Attend, Site, Tensor, option
from diffalign.guidance.per_image import wide
from diffalign.guidance.perturbing import MapChange, PerturbedAttention
from diffalign.seams.attention.intercept import cut

# scores that are held at once
SCORES = 1 << 26


@dataclass(frozen=True, slots=True)
class IdentityMaps(MapChange):
    """Every image token attends to itself; in joint attention, to itself and the text.

    The map is that of diffusers' PAG processors: text queries are left alone, and of an image
    query's keys the other image tokens are masked. Without text this is the value itself.
    """

    # innermost: what techniques further out call is the perturbed attention
    order: ClassVar[int] = 3

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.kind == "self":
            return v
        if not site.row_parts:
            return _image_apart(attend, q, k, v, site, site.parts["image"])
        rows = []
        for i, parts in enumerate(site.row_parts):
            part = slice(i, i + 1)
            below = attend.narrow(site, [i])
            rows.append(_image_apart(below, q[part], k[part], v[part], site, parts["image"]))
        return torch.cat(rows)


def _image_apart(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, image: slice
) -> Tensor:
    """Joint attention [B, A, N, any] in which image tokens see themselves and the text."""
    text = [
        part
        for part in (slice(0, image.start), slice(image.stop, k.shape[2]))
        if part.stop > part.start
    ]
    words = attend.narrow(site, queries=text)(cut(q, text), k, v)
    pieces = {image.start: _own_and_text(attend, q, k, v, image, text)}
    place = 0
    for part in text:
        size = part.stop - part.start
        pieces[part.start] = words.narrow(2, place, size)
        place += size
    return torch.cat([pieces[start] for start in sorted(pieces)], 2)


def _own_and_text(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, image: slice, text: Sequence[slice]
) -> Tensor:
    """Image queries over the text keys and their own, in float32; never [N, N] scores."""
    scale = q.shape[-1] ** -0.5 if attend.scale is None else attend.scale
    bias = _bias(attend.mask, k.shape[2])
    keys, values = wide(cut(k, text)).mT, wide(cut(v, text))
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * keys.shape[-1]))
    outputs = []
    for start in range(image.start, image.stop, step):
        part = slice(start, min(start + step, image.stop))
        queries, own_value = wide(q[:, :, part]) * scale, wide(v[:, :, part])
        own = (queries * wide(k[:, :, part])).sum(-1, keepdim=True)
        scores = queries @ keys
        if bias is not None:
            rows = bias if bias.shape[2] == 1 else bias[:, :, part]
            scores = scores + cut(rows, text, 3)
            own = own + rows[..., part].expand(-1, -1, own.shape[2], -1).diagonal(
                dim1=2, dim2=3
            ).unsqueeze(-1)
        weights = torch.cat((scores, own), -1).softmax(-1)
        outputs.append((weights[..., :-1] @ values + weights[..., -1:] * own_value).to(v.dtype))
    return torch.cat(outputs, 2)


def _bias(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask as numbers that are added to scores, [B or 1, A or 1, N or 1, L]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, device=mask.device)
        mask = zeros.masked_fill(~mask, float("-inf"))
    mask = wide(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    return mask.expand(-1, -1, -1, keys)


@dataclass(frozen=True, slots=True)
class PAG(PerturbedAttention):
    """Adds ``pag_scale * (cond - perturbed)`` to CFG, ``perturbed`` with identity attention maps.

    Ahn et al. 2024, arXiv:2403.17377: in the self-attention of chosen layers every
    image token attends to itself alone. In joint attention image tokens attend to themselves and
    the text, as in diffusers' SD3 pipeline. The default layers are diffusers' on
    U-Nets; for transformers its examples take a block near the middle (13 of 24, 14 of 28).
    Differs from diffusers: ``layers`` are patterns of whole names, not parts of them, and there is
    no ``pag_adaptive_scale``; use the window.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    Raises: ``UnsupportedModel`` on models whose self-attention has no map (Sana) or is not known.
    """

    _: KW_ONLY
    pag_scale: float = option(
        3.0, "weight of the perturbed pass; 0 is off, 3 is diffusers' default", usual=(0.0, 6.0)
    )

    @property
    def push(self) -> float:
        return self.pag_scale

    def change(self, names: frozenset[str]) -> IdentityMaps:
        return IdentityMaps(names=names)
