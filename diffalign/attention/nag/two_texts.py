"""Attention of one layer over two texts: with the prompt and with NAG's negative text, the image
tokens joined by a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from diffalign.core import Tensor
from diffalign.seams.attention.base import Site
from diffalign.seams.attention.intercept import cut, put, take, together

if TYPE_CHECKING:
    from diffalign.seams.attention.intercept import Attend

# image tokens [B, A, N, D] under the prompt and under the negative text -> guided; None where the
# layer is left alone
Guide = Callable[[Tensor, Tensor], Tensor] | None


def cross(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Keys are [prompt, negative]; every query is an image token. Rows of the unconditional branch
    see their own text only."""
    assert site.text is not None
    assert site.negative is not None
    alone = replace(site, text=slice(0, site.text.stop - site.text.start), negative=None)
    z = attend.narrow(alone, keys=[site.text])(q, cut(k, [site.text]), cut(v, [site.text]))
    if guide is None:
        return z
    rows = [row for row, conditioned in enumerate(site.conditioned) if conditioned]
    part = replace(
        site,
        text=slice(0, site.negative.stop - site.negative.start),
        negative=None,
        conditioned=(True,) * len(rows),
    )
    below = attend.narrow(part, rows, keys=[site.negative])
    away = below(
        take(q, rows), cut(take(k, rows), [site.negative]), cut(take(v, rows), [site.negative])
    )
    return put(z, rows, guide(take(z, rows), away))


def joint(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Prompt, negative text and image in one sequence, in any order: each text attends to itself
    and the image, and goes on by itself."""
    assert site.text is not None
    assert site.negative is not None
    assert site.image is not None
    rows = [row for row, conditioned in enumerate(site.conditioned) if conditioned]
    kept, (text, image) = together(site.text, site.image)
    alone = replace(site, text=text, image=image, negative=None)
    z = attend.narrow(alone, None, kept, kept)(cut(q, kept), cut(k, kept), cut(v, kept))
    other, (negative, image_too) = together(site.negative, site.image)
    part = replace(
        site, text=negative, image=image_too, negative=None, conditioned=(True,) * len(rows)
    )
    away = attend.narrow(part, rows, other, other)(*(cut(take(x, rows), other) for x in (q, k, v)))
    guided = cut(z, [image])
    if guide is not None:
        guided = put(guided, rows, guide(take(guided, rows), cut(away, [image_too])))
    stream = cut(away, [negative])
    if len(rows) < len(
        site.conditioned
    ):  # rows of the unconditional branch have a negative stream that nobody reads
        stream = put(z.new_zeros((z.shape[0], *stream.shape[1:])), rows, stream)
    pieces = {
        site.text.start: cut(z, [text]),
        site.negative.start: stream,
        site.image.start: guided,
    }
    return torch.cat([pieces[start] for start in sorted(pieces)], 2)


def twins(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide, one_image: bool
) -> Tensor:
    """Each text in a row of its own, in lock-step: the guided image tokens are written to both
    rows.

    ``one_image``: both rows attend with the image tokens of the first, although the model gave the
    second its own.
    """
    own = site.spans or ()
    spans = [site.image or own[row][1] for row in range(q.shape[0])]
    if one_image:
        q, k, v = (_copy_image(x, site.twins, spans) for x in (q, k, v))
    z = attend.narrow(replace(site, twins=()))(q, k, v)
    first = torch.stack([z[row, :, spans[row]] for row, _ in site.twins])
    if guide is not None:
        first = guide(first, torch.stack([z[twin, :, spans[twin]] for _, twin in site.twins]))
    z = z.clone()
    for guided, pair in zip(first, site.twins):
        for row in pair:
            z[row, :, spans[row]] = guided
    return z


def _copy_image(x: Tensor, pairs: Sequence[tuple[int, int]], spans: Sequence[slice]) -> Tensor:
    x = x.clone()
    for row, twin in pairs:
        x[twin, :, spans[twin]] = x[row, :, spans[row]]
    return x
