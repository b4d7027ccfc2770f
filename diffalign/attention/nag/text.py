"""The negative text of NAG: encoded once per run, carried behind the prompt on the sequence axis,
or in rows of its own.

Behind the prompt, the model's own text layers (projections, norms, feed-forward) treat its tokens
one by one, so nothing else changes. Families whose image positions depend on the text length, or
whose texts have one fixed length, get a second row per guided image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel
from diffalign.families import Family
from diffalign.families.text import Around, Encoder, SecondText, has_text_encoder
from diffalign.seams.attention.sites import Frame, text_length
from diffalign.seams.denoiser.rows import count_rows, prediction_of, take_arguments, with_prediction

if TYPE_CHECKING:
    from diffalign.attention.nag.nag import NAG
    from diffalign.seams.denoiser.call import DenoiserCall
    from diffalign.seams.denoiser.tap import Generation


def refusal(pipe: Any, family: Family, share_image: bool) -> str | None:
    """Why NAG cannot act on a pipeline, None when it can."""
    if family.second_text is None or family.encoder is None:
        return f"the text layers of {family.name} are not known"
    if not share_image and family.second_text.image_stack is None:
        return (
            "share_image=False is the published layout of Flux; on "
            f"{family.name} one image stream is the layout"
        )
    return family.second_text.check(pipe)


class NegativeStream:
    """One run's negative text.

    ``open`` adds it to a denoiser call, ``close`` takes its rows out of the result.
    """

    def __init__(self, nag: NAG, run: Generation) -> None:
        self.run, self.nag = run, nag
        assert run.family.second_text is not None
        self.second: SecondText = run.family.second_text
        self.argument = run.family.text[0]
        self.made: dict[Any, Tensor] = {}
        embeddings, where = negative_text(nag, run)
        self.text = encoder_of(run.family).denoiser(embeddings)
        run.record.notes.append(f"NAG: negative text from {where}")
        if not nag.share_image:
            if self.second.pooled not in self.text:
                raise ValueError(
                    "NAG(share_image=False) modulates with the negative pooled text; pass "
                    "negative_pooled_prompt_embeds too."
                )
            run.record.notes.append(
                "NAG: share_image=False, the published layout with a second image stream in the "
                "single blocks"
            )

    def in_rows(self, denoiser: str) -> bool:
        """Whether this denoiser gets the negative text as rows of their own."""
        module = getattr(self.run.pipe, denoiser)
        return not self.nag.share_image or self.second.in_rows(module)

    def handlers(self, attachment: Any) -> dict[Any, tuple[str, Any]]:
        """Calls besides attention that must know about the negative text: module -> (method,
        handler)."""
        found: dict[Any, tuple[str, Any]] = {}
        for denoiser in attachment.denoisers.values():
            base = getattr(denoiser, "_orig_mod", denoiser)
            for name, call in self.second.around.items():
                found[base.get_submodule(name)] = (
                    "__call__",
                    partial(_for_two_texts, attachment, call),
                )
            if not self.nag.share_image:
                found[base.get_submodule(f"{self.second.image_stack}.0")] = (
                    "__call__",
                    lambda *given: _one_image(attachment.frame, *given),
                )
        return found

    def open(
        self, evaluation: DenoiserCall, kwargs: dict[str, Any], frame: Frame
    ) -> tuple[DenoiserCall, dict[str, Any], Frame]:
        if not any(evaluation.conditioned):
            return evaluation, kwargs, frame
        images = self._images(evaluation)
        if self.in_rows(evaluation.denoiser):
            return self._add_rows(evaluation, kwargs, frame, images)
        kwargs, negative = self._extend(kwargs, images)
        return evaluation, kwargs, replace(frame, negative=negative)

    def close(self, output: Any, frame: Frame) -> Any:
        if not frame.twins:
            return output
        rows = len(frame.conditioned) - len(frame.twins)
        return with_prediction(output, prediction_of(output)[:rows])

    def _images(self, evaluation: DenoiserCall) -> list[int]:
        """Which image each row belongs to."""
        everything = range(self.run.batch)
        images = [i for p in evaluation.passes for i in (everything if p.rows is None else p.rows)]
        if len(images) != len(
            evaluation.conditioned
        ):  # compiled and cached models run whole branches
            images = [i for _ in evaluation.passes for i in everything]
        if len(images) != len(evaluation.conditioned):
            raise UnsupportedModel(
                f"NAG expected {len(images)} rows at the denoiser; got "
                f"{len(evaluation.conditioned)}."
            )
        return images

    def _rows(self, name: str, images: Sequence[int], like: Tensor) -> Tensor:
        """Rows of a text argument for these images, on the device and in the dtype of ``like``;
        made once, since steps repeat them."""
        value, key = self.text[name], (name, tuple(images), like.device, like.dtype)
        if key not in self.made:
            index = torch.tensor(self._texts_of(name, images))
            self.made[key] = value.to(like.device, like.dtype)[index.to(like.device)]
        return self.made[key]

    def _texts_of(self, name: str, images: Sequence[int]) -> list[int]:
        """Which negative text each image takes; a prompt's images stand together."""
        texts, batch = len(self.text[name]), self.run.batch
        copies = int(
            self.run.plan.values.get("num_images_per_prompt")
            or self.run.plan.values.get("num_videos_per_prompt")
            or 1
        )
        if texts not in (1, batch // copies, batch):
            many = f" with {copies} images each" if copies > 1 else ""
            raise ValueError(
                f"NAG got {texts} negative texts for {batch // copies} prompts{many}; give one, "
                "or one per prompt."
            )
        return [image * texts // batch for image in images]

    def _extend(self, kwargs: dict[str, Any], images: Sequence[int]) -> tuple[dict[str, Any], int]:
        """The denoiser's arguments with the negative text behind the prompt, and its number of
        tokens."""
        name, mask = self.argument.name, self.argument.mask
        text = kwargs[name]
        more = self._rows(name, images, text)
        changed = {**kwargs, name: torch.cat([text, more], 1)}
        if mask is not None and (kwargs.get(mask) is not None or mask in self.text):
            given = kwargs.get(mask)
            given = (
                text.new_ones(text.shape[:2], dtype=self.text[mask].dtype)
                if given is None
                else given
            )
            extra = (
                self._rows(mask, images, given)
                if mask in self.text
                else given.new_ones(more.shape[:2])
            )
            length = text.shape[
                1
            ]  # masks that go on over the image tokens are opened behind the prompt
            changed[mask] = torch.cat([given[:, :length], extra, given[:, length:]], 1)
        positions = self.argument.positions
        if positions is not None and kwargs.get(positions) is not None:
            ids = kwargs[positions]
            changed[positions] = torch.cat(
                [ids, ids.new_zeros((*ids.shape[:-2], more.shape[1], ids.shape[-1]))], -2
            )
        return changed, more.shape[1]

    def _add_rows(
        self, evaluation: DenoiserCall, kwargs: dict[str, Any], frame: Frame, images: Sequence[int]
    ) -> tuple[DenoiserCall, dict[str, Any], Frame]:
        """A second row for each conditioned row, with the negative text; padded to one length where
        a mask says so."""
        family, total = self.run.family, count_rows(next(iter(kwargs.values())))
        guided = [r for r, conditioned in enumerate(evaluation.conditioned) if conditioned]
        self.run.meter.charge(rows=len(guided), joined=True)
        changed = take_arguments(
            kwargs, [*range(total), *guided], total, family.shared, family.lists
        )
        theirs = [images[r] for r in guided]
        name, mask = self.argument.name, self.argument.mask
        if isinstance(changed[name], list):
            texts = [self.text[name][i].to(changed[name][0]) for i in self._texts_of(name, theirs)]
            changed[name] = [*changed[name][:total], *texts]
        else:
            if not self.nag.share_image and self.second.pooled is not None:
                pooled = changed[self.second.pooled]
                changed[self.second.pooled] = torch.cat(
                    [pooled[:total], self._rows(self.second.pooled, theirs, pooled)]
                )
            text = changed[name][:total]
            more = self._rows(name, theirs, text)
            if mask is not None and changed.get(mask) is not None:
                given = changed[mask][:total]
                extra = (
                    self._rows(mask, theirs, given)
                    if mask in self.text
                    else given.new_ones(more.shape[:2])
                )
                changed[mask] = _stack(given, extra)
                changed[name] = _stack(text, more)
            elif text.shape[1] != more.shape[1]:
                raise UnsupportedModel(
                    "NAG needs a negative text as long as the prompt's on this model: "
                    f"{text.shape[1]} tokens; got {more.shape[1]}. "
                    "Encode both with the same max_sequence_length."
                )
            else:
                changed[name] = torch.cat([text, more])
        twins = tuple((r, total + i) for i, r in enumerate(guided))
        conditioned = (*evaluation.conditioned, *(True for _ in guided))
        frame = replace(
            frame, twins=twins, conditioned=conditioned, text=text_length(family, changed)
        )
        return replace(evaluation, conditioned=conditioned), changed, frame


def encoder_of(family: Family) -> Encoder:
    """The family's encoder, which every family with a second text has."""
    assert family.encoder is not None
    return family.encoder


def negative_text(nag: NAG, run: Generation) -> tuple[dict[str, Any], str]:
    """The negative text under the pipeline's names without "negative_", and where it came from."""
    encode, call, wanted = encoder_of(run.family), run.plan.values, nag.negative_prompt
    embeds, where = nag.negative_embeds, "NAG(negative_embeds=...)"
    if embeds is not None:
        known = {f"negative_{name}" for name in encode.arguments} | {
            name for name in encode.results if name.startswith("negative_")
        }
        if unknown := set(embeds) - known:
            raise ValueError(
                f"NAG(negative_embeds=...) has {sorted(unknown)}; {run.family.name} takes "
                f"{', '.join(sorted(known))}."
            )
    elif wanted is None and call.get("negative_prompt_embeds") is not None:
        embeds, where = call, "negative_prompt_embeds of the call"
    if embeds is not None:
        given = {name: embeds.get(f"negative_{name}") for name in encode.arguments}
        return {name: value for name, value in given.items() if value is not None}, where
    where, more = "NAG(negative_prompt=...)", {}
    if wanted is None:
        wanted = call.get("negative_prompt") or ""
        more = {
            name: call[name]
            for name in ("negative_prompt_2", "negative_prompt_3")
            if call.get(name)
        }
        where = "negative_prompt of the call" if wanted or more else "the empty prompt"
    count = max(1 if isinstance(given, str) else len(given) for given in (wanted, *more.values()))
    texts, *others = (
        [given] * count if isinstance(given, str) else list(given)
        for given in (wanted, *more.values())
    )
    more = dict(zip(more, others))
    if not has_text_encoder(run.pipe):
        raise UnsupportedModel(
            f"NAG needs a negative text, and {type(run.pipe).__name__} has no text encoder "
            "loaded: pass negative_prompt_embeds (with the "
            "masks and pooled embeddings that go with them) to the pipeline call, or as "
            "NAG(negative_embeds={...})."
        )
    return encode.embeddings(run.pipe, texts, negative=True, call=call, **more), where


def _stack(a: Tensor, b: Tensor) -> Tensor:
    """Rows of ``a`` [R, L, ...] and of ``b``, the shorter ones filled up with zeros."""
    length = max(a.shape[1], b.shape[1])
    return torch.cat(
        [
            torch.cat([x, x.new_zeros((x.shape[0], length - x.shape[1], *x.shape[2:]))], 1)
            for x in (a, b)
        ]
    )


def _for_two_texts(
    attachment: Any, call: Around, original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """A module that numbers or counts the text tokens, called for two texts where there are two."""
    frame = attachment.frame
    if frame is None or not frame.negative:
        return original(*args, **kwargs)
    return call(original, args, kwargs, frame.text, frame.negative)


def _one_image(
    frame: Frame | None, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Flux, published layout: up to the single blocks both rows of a pair have one image stream."""
    if frame is None or not frame.twins:
        return original(*args, **kwargs)
    image = kwargs["hidden_states"].clone()
    for row, twin in frame.twins:
        image[twin] = image[row]
    return original(*args, **{**kwargs, "hidden_states": image})
