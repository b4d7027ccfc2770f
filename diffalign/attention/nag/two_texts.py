"""Attention of one layer over two texts: with the prompt and with NAG's negative text, the image
tokens joined by a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from diffalign.core import Attend, Site, Tensor
from diffalign.kernels.partial import join
from diffalign.seams.attention.intercept import cut, put, take, together

# image tokens [B, A, N, D] under the prompt and under the negative text -> guided; None where the
# layer is left alone
Guide = Callable[[Tensor, Tensor], Tensor] | None


class Tokens(NamedTuple):
    """Queries, keys and values of some tokens, each [B, A, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Streams(NamedTuple):
    """What a layer returns for one text: its own tokens [B, A, L, D], and the image's."""

    text: Tensor
    image: Tensor


def cross(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Keys are [prompt, negative]; every query is an image token. Rows of the unconditional branch
    see their own text only."""
    prompt, negative, image = (site.parts[name] for name in ("prompt", "negative", "image"))
    alone = replace(site, parts={"prompt": _first(prompt), "image": image})
    z = attend.narrow(alone, keys=[prompt])(q, cut(k, [prompt]), cut(v, [prompt]))
    if guide is None:
        return z
    rows = _rows(site, True)
    part = replace(
        site,
        parts={"prompt": _first(negative), "image": image},
        conditioned=(True,) * len(rows),
    )
    below = attend.narrow(part, rows, keys=[negative])
    away = below(take(q, rows), cut(take(k, rows), [negative]), cut(take(v, rows), [negative]))
    return put(z, rows, guide(take(z, rows), away))


def borrowed(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Cross-attention where the negative text is that of other rows, those of the unconditional
    branch: ``site.negatives`` says which."""
    pairs, alone = site.negatives, replace(site, negatives=())
    z = attend.narrow(alone)(q, k, v)
    if guide is None:
        return z
    rows, others = ([pair[side] for pair in pairs] for side in (0, 1))
    part = replace(alone, conditioned=(True,) * len(rows))
    away = attend.narrow(part, others)(take(q, rows), take(k, others), take(v, others))
    return put(z, rows, guide(take(z, rows), away))


def joint(attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site, guide: Guide) -> Tensor:
    """Prompt, negative text and image in one sequence, in any order: each text attends to itself
    and the image, and goes on by itself.

    Rows of the unconditional branch have a negative stream that nobody reads.
    """
    parts = tuple(site.parts[name] for name in ("prompt", "negative", "image"))
    negative = parts[1]
    rows, others = _rows(site, True), _rows(site, False)
    part = replace(site, conditioned=(True,) * len(rows))
    qkv = Tokens(*(take(x, rows) for x in (q, k, v)))
    texts = [_tokens(qkv, site, text) for text in ("prompt", "negative")]
    streams = once(attend, _tokens(qkv, site, "image"), texts)
    if streams is None:
        streams = [_one(attend, qkv, part, rows, text) for text in ("prompt", "negative")]
    (text, z), (away_text, away) = streams
    guided = _sequence(parts, text, away_text, z if guide is None else guide(z, away))
    if not others:
        return guided
    alone = replace(site, conditioned=(False,) * len(others))
    qkv = Tokens(*(take(x, others) for x in (q, k, v)))
    text, z = _one(attend, qkv, alone, others, "prompt")
    unread = z.new_zeros((*z.shape[:2], negative.stop - negative.start, z.shape[-1]))
    plain = _sequence(parts, text, unread, z)
    return _rows_together((rows, guided), (others, plain))


def _tokens(qkv: Tokens, site: Site, name: str) -> Tokens:
    """The tokens of one part of a joint sequence."""
    q, k, v = qkv
    return Tokens(cut(q, [site.parts[name]]), *(cut(x, [site.keys[name]]) for x in (k, v)))


def once(attend: Attend, image: Tokens, texts: Sequence[Tokens]) -> list[Streams] | None:
    """Joint attention of one image with each of several texts; what the image attends to in itself
    is computed once.

    None where the attention below does not tell the log-sum-exps that this needs.
    """
    streams = []
    itself = attend.part(*image)
    for text in texts if itself is not None else ():
        seen = attend.part(image.q, text.k, text.v)
        parts = [attend.part(text.q, other.k, other.v) for other in (image, text)]
        if itself is None or seen is None or parts[0] is None or parts[1] is None:
            return None
        streams.append(Streams(join(parts[0], parts[1]), join(itself, seen)))
    return streams or None


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
        shared = _one_image(attend, Tokens(q, k, v), site, guide)
        if shared is not None:
            return shared
        keys = [site.keys["image"]] * len(images) if site.key_parts else images
        q = _copy_image(q, site.copies, images)
        k, v = (_copy_image(x, site.copies, keys) for x in (k, v))
    z = attend.narrow(replace(site, copies=()))(q, k, v)
    guided = torch.stack([z[row, :, images[row]] for row, _ in site.copies])
    if guide is not None:
        guided = guide(guided, torch.stack([z[copy, :, images[copy]] for _, copy in site.copies]))
    z = z.clone()
    for tokens, pair in zip(guided, site.copies):
        for row in pair:
            z[row, :, images[row]] = tokens
    return z


def _one_image(attend: Attend, qkv: Tokens, site: Site, guide: Guide) -> Tensor | None:
    """``two_rows`` with one image stream, None where it cannot be computed once."""
    sides = [[pair[side] for pair in site.copies] for side in (0, 1)]
    if site.row_parts or sides[0] + sides[1] != list(range(len(qkv.q))):
        return None
    both = [Tokens(*(take(x, rows) for x in qkv)) for rows in sides]
    texts = [_tokens(row, site, "prompt") for row in both]
    streams = once(attend, _tokens(both[0], site, "image"), texts)
    if streams is None:
        return None
    (text, z), (away_text, away) = streams
    guided = z if guide is None else guide(z, away)
    parts = (site.parts["prompt"], site.parts["image"])
    return torch.cat([_sequence(parts, stream, guided) for stream in (text, away_text)])


def _one(attend: Attend, qkv: Tokens, site: Site, rows: Sequence[int], text: str) -> Streams:
    """One text and the image in one softmax; ``qkv`` are those of ``rows``."""
    ordered, (text_place, image_place) = together(site.parts[text], site.parts["image"])
    keys, (text_keys, image_keys) = together(site.keys[text], site.keys["image"])
    site = replace(
        site,
        parts={"prompt": text_place, "image": image_place},
        key_parts={"prompt": text_keys, "image": image_keys} if site.key_parts else {},
    )
    q, k, v = cut(qkv.q, ordered), cut(qkv.k, keys), cut(qkv.v, keys)
    z = attend.narrow(site, rows, ordered, keys)(q, k, v)
    return Streams(cut(z, [text_place]), cut(z, [image_place]))


def _sequence(parts: Sequence[slice], *streams: Tensor) -> Tensor:
    """Streams [B, A, L, D], each in its place."""
    pieces = {part.start: stream for part, stream in zip(parts, streams)}
    return torch.cat([pieces[start] for start in sorted(pieces)], 2)


def _rows_together(a: tuple[list[int], Tensor], b: tuple[list[int], Tensor]) -> Tensor:
    """Two sets of rows, each (places, values), as one batch."""
    first, second = sorted((a, b), key=lambda rows: rows[0][0])
    places = first[0] + second[0]
    if places == list(range(len(places))):
        return torch.cat([first[1], second[1]])
    empty = first[1].new_empty((len(places), *first[1].shape[1:]))
    return put(put(empty, *first), *second)


def _first(part: slice) -> slice:
    """Where ``part`` lies once it stands first."""
    return slice(0, part.stop - part.start)


def _rows(site: Site, conditioned: bool) -> list[int]:
    return [row for row, flag in enumerate(site.conditioned) if flag is conditioned]


def _copy_image(x: Tensor, pairs: Sequence[tuple[int, int]], images: Sequence[slice]) -> Tensor:
    x = x.clone()
    for row, copy in pairs:
        x[copy, :, images[copy]] = x[row, :, images[row]]
    return x
