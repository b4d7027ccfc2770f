"""Attention of one layer over two texts: with the prompt and with NAG's negative text, the image
tokens joined by a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from diffalign.core import Attend, Site, Tensor
from diffalign.seams.attention.intercept import cut, put, take, together

# image tokens [B, A, N, D] under the prompt and under the negative text -> guided; None where the
# layer is left alone
Guide = Callable[[Tensor, Tensor], Tensor] | None


def cross(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Keys are [prompt, negative]; every query is an image token. Rows of the unconditional branch
    see their own text only."""
    prompt, negative, image = (site.parts[name] for name in ("prompt", "negative", "image"))
    alone = replace(site, parts={"prompt": _first(prompt), "image": image})
    z = attend.narrow(alone, keys=[prompt])(q, cut(k, [prompt]), cut(v, [prompt]))
    if guide is None:
        return z
    rows = _conditioned(site)
    part = replace(
        site,
        parts={"prompt": _first(negative), "image": image},
        conditioned=(True,) * len(rows),
    )
    below = attend.narrow(part, rows, keys=[negative])
    away = below(take(q, rows), cut(take(k, rows), [negative]), cut(take(v, rows), [negative]))
    return put(z, rows, guide(take(z, rows), away))


def joint(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Prompt, negative text and image in one sequence, in any order: each text attends to itself
    and the image, and goes on by itself."""
    prompt, negative, image = (site.parts[name] for name in ("prompt", "negative", "image"))
    rows = _conditioned(site)
    ordered, (prompt_place, image_place) = together(prompt, image)
    alone = replace(site, parts={"prompt": prompt_place, "image": image_place})
    z = attend.narrow(alone, None, ordered, ordered)(*(cut(x, ordered) for x in (q, k, v)))
    ordered, (negative_place, image_too) = together(negative, image)
    part = replace(
        site,
        parts={"prompt": negative_place, "image": image_too},
        conditioned=(True,) * len(rows),
    )
    below = attend.narrow(part, rows, ordered, ordered)
    away = below(*(cut(take(x, rows), ordered) for x in (q, k, v)))
    guided = cut(z, [image_place])
    if guide is not None:
        guided = put(guided, rows, guide(take(guided, rows), cut(away, [image_too])))
    stream = cut(away, [negative_place])
    if len(rows) < len(site.conditioned):
        # rows of the unconditional branch have a negative stream that nobody reads
        stream = put(z.new_zeros((z.shape[0], *stream.shape[1:])), rows, stream)
    pieces = {
        prompt.start: cut(z, [prompt_place]),
        negative.start: stream,
        image.start: guided,
    }
    return torch.cat([pieces[start] for start in sorted(pieces)], 2)


def two_rows(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide, one_image: bool
) -> Tensor:
    """Each text in a row of its own, in lock-step: the guided image tokens are written to both
    rows.

    ``one_image``: both rows attend with the image tokens of the first, although the model gave the
    second its own.
    """
    rows = site.row_parts or (site.parts,) * q.shape[0]
    images = [parts["image"] for parts in rows]
    if one_image:
        q, k, v = (_copy_image(x, site.copies, images) for x in (q, k, v))
    z = attend.narrow(replace(site, copies=()))(q, k, v)
    guided = torch.stack([z[row, :, images[row]] for row, _ in site.copies])
    if guide is not None:
        guided = guide(guided, torch.stack([z[copy, :, images[copy]] for _, copy in site.copies]))
    z = z.clone()
    for tokens, pair in zip(guided, site.copies):
        for row in pair:
            z[row, :, images[row]] = tokens
    return z


def _first(part: slice) -> slice:
    """Where ``part`` lies once it stands first."""
    return slice(0, part.stop - part.start)


def _conditioned(site: Site) -> list[int]:
    return [row for row, conditioned in enumerate(site.conditioned) if conditioned]


def _copy_image(x: Tensor, pairs: Sequence[tuple[int, int]], images: Sequence[slice]) -> Tensor:
    x = x.clone()
    for row, copy in pairs:
        x[copy, :, images[copy]] = x[row, :, images[row]]
    return x
