"""A token technique on one generation: which tokens each denoiser call computes, and what is kept
between calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from diffalign.core import TokenTechnique, UnsupportedModel
from diffalign.core.errors import warn_once
from diffalign.core.registry import name_of
from diffalign.families.layout import Grid
from diffalign.seams.attention.intercept import take
from diffalign.seams.attention.sites import Layer, layers_of, map_layers, text_length
from diffalign.seams.blocks.states import BlockStates, Row, rows_of
from diffalign.seams.denoiser.call import DenoiserCall
from diffalign.seams.swap import unwrapped
from diffalign.seams.tokens.memory import Memory, TokenStates
from diffalign.seams.tokens.passage import Passage, Running, gathered, scattered
from diffalign.seams.tokens.work import Account, Work, work_of

if TYPE_CHECKING:
    from diffalign.seams.denoiser.tap import Generation


class Tokens:
    """One token technique in one generation."""

    def __init__(
        self, technique: TokenTechnique[Any], generation: Generation, models: Mapping[str, Any]
    ) -> None:
        """``models``: denoisers by name, those of passes too."""
        assert generation.family.tokens is not None
        self.technique, self.generation = technique, generation
        self.places, self.name = generation.family.tokens, name_of(technique)
        self.models = {name: unwrapped(model) for name, model in models.items()}
        # attention layers in which image tokens have keys
        self.layers = [
            layer
            for name, model in self.models.items()
            for layer in map_layers(generation.family, name, model)
        ]
        self.grid: Grid | None = None
        self.account: Account | None = None
        # steps of the whole trajectory
        self.count = 0
        # memories into which this generation may write; it copies the others first
        self.own_memories: WeakSet[Memory] = WeakSet()

    def with_layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """``layers`` and those that token techniques act on."""
        modules = {layer.module for layer in layers}
        return [*layers, *(layer for layer in self.layers if layer.module not in modules)]

    def handlers(self, running: Running) -> dict[Any, tuple[str, Any]]:
        """Patch embedding and output layer of every model."""
        handlers: dict[Any, tuple[str, Any]] = {}
        for model in self.models.values():
            for place, handler in ((self.places.embed, gathered), (self.places.out, scattered)):
                module = model.get_submodule(place)
                handlers[module] = ("__call__", functools.partial(handler, running))
        return handlers

    def open(self, call: DenoiserCall, arguments: dict[str, Any]) -> Passage | None:
        """The passage of a denoiser call; None where it computes all tokens and leaves nothing."""
        text, self.count = text_length(self.generation.family, arguments), call.step.count
        if self.grid is None or self.account is None:
            model = self.models[call.denoiser]
            self.grid = self.generation.family.grid(model, arguments)
            self.account = Account(self._work_of(call.denoiser), math.prod(self.grid))
        passage = self._passage(call, self.account.tokens)
        index = None if passage is None else passage.index
        self.account.add(call.step.index, len(call.conditioned), index, text)
        return passage

    def _work_of(self, denoiser: str) -> Work:
        family, model = self.generation.family, self.models[denoiser]
        layers = [layer for layer in self.layers if layer.denoiser == denoiser]
        layers += [x for x in layers_of(family, denoiser, model) if x.kind == "cross"]
        return work_of(self.places, model, layers)

    def _passage(self, call: DenoiserCall, tokens: int) -> Passage | None:
        step, p = call.step, call.passes[0]
        if not self.technique.active(step) or p.attention is not None:
            return None
        states = self._states(call)
        rows = rows_of(call, self.generation.batch)
        known, memory = _memory_of(states.memories, _kind(call), rows)
        if memory is not None and memory.step == step.index:
            return None  # these rows again in one step: what the first call left stays
        images, index = [image for _, image in rows], None
        ready = memory is not None and (memory.step, memory.blocks) == (step.index - 1, p.blocks)
        in_place = not torch.is_grad_enabled()
        if states.computed is not None and ready and memory is not None:
            index = _of_images(states.computed, images)
            if known != rows or (in_place and memory not in self.own_memories):
                memory = memory.select([known.index(row) for row in rows])
        remembers = self.technique.remembers(step)
        passage = Passage(self.places, tokens, images, index, memory, remembers)
        passage.in_place = in_place
        return passage

    def _states(self, call: DenoiserCall) -> TokenStates:
        """The states at this step, its tokens chosen."""
        known, step = self.generation.states, call.step
        states: TokenStates | None = known.get(self.name)
        if states is None:
            states = TokenStates(self.technique.init(self.generation.batch))
        if states.step != step.index:
            computed = self.technique.choose(step, states.technique)
            states = replace(states, step=step.index, computed=computed, seen=False)
        known[self.name] = states
        return states

    def close(self, passage: Passage, call: DenoiserCall) -> None:
        """A call has run: what it leaves for later ones, and what the technique sees of it."""
        prediction, p, step = passage.prediction, call.passes[0], call.step
        if prediction is None:
            raise UnsupportedModel(f"The model did not call {self.places.out!r}.")
        states: TokenStates = self.generation.states[self.name]
        memories = states.memories
        if passage.at_layers:
            rows = rows_of(call, self.generation.batch)
            memory = Memory(passage.keys, passage.values, prediction, step.index, p.blocks)
            memories = memories.after(_kind(call), rows, memory)
            if passage.in_place:
                self.own_memories.add(memory)
            if self.account is not None:
                self.account.remembered(memory for _, _, memory in memories.parts)
        states = replace(states, memories=memories)
        rows_seen = None if states.seen or step.evaluation else self._seen(passage, call)
        if rows_seen is not None and self.grid is not None:
            computed = None if passage.index is None else states.computed
            tokens = take(prediction.detach(), rows_seen)
            after = self.technique.observe(tokens, computed, self.grid, step, states.technique)
            states = replace(states, technique=after, seen=True)
        self.generation.states[self.name] = states

    def _seen(self, passage: Passage, call: DenoiserCall) -> list[int] | None:
        """The row of each image whose prediction the technique sees: with the prompt where there is
        one. None where an image has none in this call."""
        count = len(call.conditioned) - len(call.copies)
        places = {passage.images[i]: i for i in reversed(range(count))}
        places |= {passage.images[i]: i for i in range(count) if call.conditioned[i]}
        images = range(self.generation.batch)
        return [places[image] for image in images] if set(images) <= set(places) else None

    def finish(self, complete: bool) -> None:
        """Tell the report what was left out; nothing is kept but for the segment that follows."""
        states = self.generation.states.get(self.name)
        over = self.generation.start is None or (states and states.step == self.count - 1)
        if states is not None and over:
            del self.generation.states[self.name]
        if self.account is None:
            return
        record, name = self.generation.record, type(self.technique).__name__
        pruned, layers = len(self.account.steps), len(self.layers)
        record.layers[name], record.acted[name] = (layers if pruned else 0, layers), pruned
        record.pruning[name] = self.account.facts()
        if complete and not pruned and self.generation.start is None:
            note = f"{name} never left a token out in this run's {len(record.sigma)} steps."
            warn_once(note)
            record.notes.append(note)


def _kind(call: DenoiserCall) -> str:
    """What a memory belongs to: second evaluations of a step have their own."""
    return f"{call.denoiser} {call.step.evaluation}"


def _memory_of(
    memories: BlockStates, kind: str, rows: tuple[Row, ...]
) -> tuple[tuple[Row, ...], Memory | None]:
    """What earlier calls left of ``rows``, and the rows that it holds."""
    for name, known, memory in memories.parts:
        if name == kind and set(rows) <= set(known):
            return known, memory
    return rows, None


def _of_images(computed: Tensor, images: list[int]) -> Tensor:
    """``computed`` [B, kept] for rows of these images."""
    times, rest = divmod(len(images), len(computed))
    if not rest and images == [*range(len(computed))] * times:
        return computed.repeat(times, 1)
    return computed[torch.tensor(images, device=computed.device)]
