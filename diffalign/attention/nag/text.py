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

from diffalign.attention.nag.rows import TextRows
from diffalign.attention.nag.spared import NEGATIVE, Borrowed, handlers_of
from diffalign.core import UnsupportedModel
from diffalign.families import Family
from diffalign.families.text import Argument, Around, Encoder, SecondText, has_text_encoder
from diffalign.seams.attention.call import CallView, Handlers, RunningCall
from diffalign.seams.attention.sites import text_length
from diffalign.seams.denoiser.rows import count_rows, prediction_of, take_arguments, with_prediction
from diffalign.seams.swap import unwrapped

if TYPE_CHECKING:
    from diffalign.attention.nag.nag import NAG
    from diffalign.seams.denoiser.call import DenoiserCall
    from diffalign.seams.denoiser.tap import Generation

POOLED = "negative_pooled_prompt_embeds"


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


class NegativeText:
    """One generation's negative text: a ``CallExtension`` that adds it to denoiser calls."""

    def __init__(self, nag: NAG, generation: Generation) -> None:
        self.generation, self.share_image = generation, nag.share_image
        assert generation.family.second_text is not None
        self.second: SecondText = generation.family.second_text
        self.argument = generation.family.text[0]
        embeddings, source = negative_text(nag, generation)
        text = encoder_of(generation.family).denoiser(embeddings)
        self.rows = TextRows(text, generation)
        self.borrowed = Borrowed(generation.family, self.rows)
        notes = generation.record.notes
        notes.append(f"NAG: negative text from {source}")
        if not self.share_image:
            if self.second.pooled not in text:
                raise ValueError(
                    "NAG(share_image=False) modulates with the negative pooled text; pass "
                    "negative_pooled_prompt_embeds too."
                )
            notes.append(
                "NAG: share_image=False, the published layout with a second image stream in the "
                "single blocks"
            )
        elif pooled_is_dropped(nag, generation):
            notes.append(f"NAG does not use {POOLED}: {self._dropped()}")

    def _dropped(self) -> str:
        """What becomes of a negative pooled text that is not used."""
        kept = "the negative text is modulated with the prompt's pooled text"
        used = self.second.image_stack is not None
        return f"{kept}; share_image=False uses it" if used else kept

    def handlers(self, running: RunningCall, denoisers: Mapping[str, Any]) -> Handlers:
        """Calls besides attention that must know about the negative text."""
        handlers: Handlers = {}
        if not running.opaque:  # in a compiled model each would break a graph
            handlers = handlers_of(
                running, self.generation.family, denoisers, one_image=not self.share_image
            )
        for model in map(unwrapped, denoisers.values()):
            for name, call in self.second.around.items():
                two_texts = partial(_for_two_texts, running, call)
                handlers[model.get_submodule(name)] = ("__call__", two_texts)
            if not self.share_image:
                first = model.get_submodule(f"{self.second.image_stack}.0")
                handlers[first] = ("__call__", partial(_one_image, running))
        return handlers

    def open(
        self, call: DenoiserCall, arguments: dict[str, Any], view: CallView
    ) -> tuple[DenoiserCall, dict[str, Any], CallView]:
        """The call with the negative text in it, where any row carries the prompt."""
        if not any(call.conditioned):
            return call, arguments, view
        images = call.images(self.generation.batch)
        module = getattr(self.generation.pipe, call.denoiser)
        if not self.share_image or self.second.in_rows(unwrapped(module)):
            return self._add_rows(call, arguments, view, images)
        if pairs := self.borrowed.pairs(call, arguments, images):
            return call, arguments, replace(view, negatives=pairs)
        arguments, count = self._extend(arguments, images)
        return call, arguments, replace(view, added={**view.added, NEGATIVE: count})

    def close(self, output: Any, view: CallView) -> Any:
        """The model's output without the rows of the negative text."""
        if not view.copies:
            return output
        rows = len(view.conditioned) - len(view.copies)
        return with_prediction(output, prediction_of(output)[:rows])

    def _extend(
        self, arguments: dict[str, Any], images: Sequence[int]
    ) -> tuple[dict[str, Any], int]:
        """The denoiser's arguments with the negative text behind the prompt, and its length."""
        name, mask, positions = self.argument.name, self.argument.mask, self.argument.positions
        prompt = arguments[name]
        negative = self.rows(name, images, prompt)
        changed = {**arguments, name: torch.cat([prompt, negative], 1)}
        if mask is not None and (arguments.get(mask) is not None or mask in self.rows.text):
            opened = arguments.get(mask)
            if opened is None:
                opened = prompt.new_ones(prompt.shape[:2], dtype=self.rows.text[mask].dtype)
            added = self.rows.mask(mask, images, opened, negative)
            # masks that go on over the image tokens are opened behind the prompt
            length = prompt.shape[1]
            changed[mask] = torch.cat([opened[:, :length], added, opened[:, length:]], 1)
        if positions is not None and arguments.get(positions) is not None:
            ids = arguments[positions]
            zeros = ids.new_zeros((*ids.shape[:-2], negative.shape[1], ids.shape[-1]))
            changed[positions] = torch.cat([ids, zeros], -2)
        return changed, negative.shape[1]

    def _add_rows(
        self, call: DenoiserCall, arguments: dict[str, Any], view: CallView, images: Sequence[int]
    ) -> tuple[DenoiserCall, dict[str, Any], CallView]:
        """A second row for each conditioned row, with the negative text."""
        family, total = self.generation.family, count_rows(next(iter(arguments.values())))
        guided = [row for row, conditioned in enumerate(call.conditioned) if conditioned]
        self.generation.meter.charge(rows=len(guided), joined=True)
        rows = [*range(total), *guided]
        changed = take_arguments(arguments, rows, total, family)
        self._fill(changed, total, [images[row] for row in guided])
        copies = tuple((row, total + i) for i, row in enumerate(guided))
        conditioned = (*call.conditioned, *(True for _ in guided))
        view = replace(
            view, copies=copies, conditioned=conditioned, prompt=text_length(family, changed)
        )
        return replace(call, conditioned=conditioned, copies=copies), changed, view

    def _fill(self, arguments: dict[str, Any], total: int, images: Sequence[int]) -> None:
        """The negative text of ``images`` in the rows behind the first ``total``."""
        pooled = self.second.pooled
        if not self.share_image and pooled is not None:
            vectors = arguments[pooled][:total]
            arguments[pooled] = torch.cat([vectors, self.rows(pooled, images, vectors)])
        for argument in self.generation.family.text:
            self._fill_one(argument, arguments, total, images)

    def _fill_one(
        self, argument: Argument, arguments: dict[str, Any], total: int, images: Sequence[int]
    ) -> None:
        """One text argument; padded to one length where a mask says so."""
        name, mask, axis = argument.name, argument.mask, argument.rows
        if isinstance(arguments[name], list):
            prompts = arguments[name][:total]
            numbers = self.rows.numbers(name, images)
            arguments[name] = [*prompts, *(self.rows.text[name][i].to(prompts[0]) for i in numbers)]
            return
        prompt = arguments[name].narrow(axis, 0, total)
        negative = self.rows(name, images, prompt, axis)
        if mask is not None and arguments.get(mask) is not None:
            opened = arguments[mask][:total]
            arguments[mask] = _stack(opened, self.rows.mask(mask, images, opened, negative))
            arguments[name] = _stack(prompt, negative)
            return
        length, other = prompt.shape[argument.axis], negative.shape[argument.axis]
        if length != other:
            raise UnsupportedModel(
                "NAG needs a negative text as long as the prompt's on this model: "
                f"{length} tokens; got {other}. "
                "Encode both with the same max_sequence_length."
            )
        arguments[name] = torch.cat([prompt, negative], axis)


def pooled_is_dropped(nag: NAG, generation: Generation) -> bool:
    """Whether somebody has passed a negative pooled text that nothing reads."""
    if nag.negative_embeds is not None:
        return nag.negative_embeds.get(POOLED) is not None
    if nag.negative_prompt is not None or generation.plan.opened:  # there the guidance reads it
        return False
    return generation.plan.values.get(POOLED) is not None


def encoder_of(family: Family) -> Encoder:
    """The family's encoder, which every family with a second text has."""
    assert family.encoder is not None
    return family.encoder


def negative_text(nag: NAG, generation: Generation) -> tuple[dict[str, Any], str]:
    """The first negative text that is there, encoded, and the words in which the report names it.

    Under the pipeline's names without "negative_".
    """
    call = generation.plan.values
    if nag.negative_embeds is not None:
        _check_names(nag.negative_embeds, generation.family)
        return _embeddings(nag.negative_embeds, generation.family), "NAG(negative_embeds=...)"
    if nag.negative_prompt is not None:
        return _encoded(generation, nag.negative_prompt), "NAG(negative_prompt=...)"
    embeds = f"negative_{generation.family.embeddings}"
    if call.get(embeds) is not None:
        return _embeddings(call, generation.family), f"{embeds} of the call"
    names = ("negative_prompt_2", "negative_prompt_3", "negative_prompt_4")
    others = {name: call[name] for name in names if call.get(name)}
    text = call.get("negative_prompt") or ""
    source = "negative_prompt of the call" if text or others else "the empty prompt"
    return _encoded(generation, text, **others), source


def _check_names(embeds: Mapping[str, Any], family: Family) -> None:
    encoder = encoder_of(family)
    known = {f"negative_{name}" for name in encoder.arguments} | {
        name for name in encoder.results if name.startswith("negative_")
    }
    if unknown := set(embeds) - known:
        raise ValueError(
            f"NAG(negative_embeds=...) has {sorted(unknown)}; {family.name} takes "
            f"{', '.join(sorted(known))}."
        )


def _embeddings(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What ``values`` hold of the negative text."""
    embeddings = {name: values.get(f"negative_{name}") for name in encoder_of(family).arguments}
    return {name: value for name, value in embeddings.items() if value is not None}


def _encoded(
    generation: Generation, text: str | Sequence[str], **others: str | Sequence[str]
) -> dict[str, Any]:
    """Negative texts encoded as the pipeline would.

    ``others``: for further text encoders; where one is a list, a single text stands for all.
    """
    pipe = generation.pipe
    if not has_text_encoder(pipe):
        raise UnsupportedModel(
            f"NAG needs a negative text, and {type(pipe).__name__} has no text encoder "
            f"loaded: pass negative_{generation.family.embeddings} (with the "
            "masks and pooled embeddings that go with them) to the pipeline call, or as "
            "NAG(negative_embeds={...})."
        )
    count = max(1 if isinstance(item, str) else len(item) for item in (text, *others.values()))
    texts, *more = (
        [item] * count if isinstance(item, str) else list(item) for item in (text, *others.values())
    )
    encode, call = encoder_of(generation.family).embeddings, generation.plan.values
    return encode(pipe, texts, negative=True, call=call, **dict(zip(others, more)))


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
    running: RunningCall, call: Around, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A module that numbers or counts the text tokens, called for two texts where there are two."""
    view = running.view
    if view is None or NEGATIVE not in view.added:
        return original(*args, **kwargs)
    return call(original, args, kwargs, view.prompt, view.added[NEGATIVE])


def _one_image(
    running: RunningCall, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Flux, published layout: up to the single blocks both rows of a pair have one image stream."""
    view = running.view
    if view is None or not view.copies:
        return original(*args, **kwargs)
    image = (args[0] if args else kwargs["hidden_states"]).clone()
    for row, copy in view.copies:
        image[copy] = image[row]
    if args:  # as cache-dit calls blocks
        return original(image, *args[1:], **kwargs)
    return original(**{**kwargs, "hidden_states": image})
