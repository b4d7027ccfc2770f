"""How the pipeline is called in a run, and an image made again from its lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.core import Meter, State, Technique, UnsupportedModel
from diffalign.core.sampler import Sampler
from diffalign.core.search import Lineage
from diffalign.core.types import Pipeline
from diffalign.core.words import Shift
from diffalign.seams.trajectory.cached import CachedSampler
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.search.video.choice import expander_of
from diffalign.search.video.sampler import ChunkSampler

AnySampler = PipelineSampler | ChunkSampler


@dataclass(frozen=True, slots=True)
class Setting:
    """How the pipeline is called."""

    pipe: Pipeline
    prompt: str
    techniques: tuple[Technique, ...] = ()
    # further arguments of the pipeline
    call: Mapping[str, Any] = field(default_factory=dict)
    kernel: Any = None
    # threshold of the first-block cache, None for no cache
    cache: float | None = None
    # added to the embeddings of tokens of the prompt
    shift: Shift | None = None
    # whether the pipeline makes a video chunk after chunk
    chunked: bool = False
    # [F, 3, H, W] in [0, 1], frames that every video begins with
    clip: Tensor | None = None

    def other(
        self,
        techniques: Sequence[Technique] | None,
        call: Mapping[str, Any] | None,
        prompt: str | None,
        cache: float | None,
        shift: Shift | None,
    ) -> Setting:
        """This setting with what is not None instead; ``call`` is merged into the arguments."""
        return replace(
            self,
            techniques=self.techniques if techniques is None else tuple(techniques),
            call={**self.call, **(call or {})},
            prompt=prompt or self.prompt,
            cache=self.cache if cache is None else cache,
            shift=self.shift if shift is None else shift,
        )

    def known(self, lineage: Lineage, prompt: str, dtype: torch.dtype) -> Lineage:
        """A lineage of a run of this setting: its text where that is not ``prompt``, its shift, and
        its noise in the pipeline's dtype, to which the run has rounded it."""
        text = None if self.prompt == prompt else self.prompt
        return replace(
            lineage,
            chunks=self.chunked,
            prompt=text if lineage.prompt is None else lineage.prompt,
            shift=self.shift if lineage.shift is None else lineage.shift,
            noise=None if lineage.noise is None else lineage.noise.to(dtype),
        )

    def sampler(self, meter: Meter) -> AnySampler:
        """A sampler of this setting, not open yet.

        Raises: ``UnsupportedModel`` for what a video chunk after chunk cannot have.
        """
        call = {**self.call, "prompt": self.prompt}
        if self.chunked:
            for name in ("kernel", "cache", "shift"):
                if getattr(self, name) is not None:
                    raise UnsupportedModel(
                        f"{name}={getattr(self, name)!r} does not act on a video that is made "
                        "chunk after chunk; leave it out."
                    )
            expander = expander_of(self.pipe, self.techniques, meter, **call)
            clip = None if self.clip is None else expander.check_clip(self.clip)
            return ChunkSampler(expander, clip)
        call["shift"] = self.shift
        if self.cache is None:
            return PipelineSampler(self.pipe, self.techniques, meter, kernel=self.kernel, **call)
        return CachedSampler(
            self.pipe, self.techniques, meter, kernel=self.kernel, cache=self.cache, **call
        )


def finished(sampler: Sampler, lineage: Lineage) -> State:
    """The finished state of one image, made alone from the beginning by its random choices."""
    first, *others = lineage.moves
    noise: Tensor | None = None if lineage.noise is None else lineage.noise[None]
    state = sampler.start([first.seed], noise)
    for move in others:
        state = _led(sampler, state, move.step, lineage)
        if move.back is not None:
            state = sampler.renoise(state, move.back, [move.seed])
        else:
            state = state.reseed([move.seed])
    return _led(sampler, state, state.count, lineage)


def _led(sampler: Sampler, state: State, until: int, lineage: Lineage) -> State:
    """The state at evaluation ``until``, led there by the drifts of its lineage."""
    for step, drift in lineage.drifts:
        if state.step <= step < until:
            state = sampler.run(state, step) if step > state.step else state
            state = sampler.run(state, step + 1, drift[None].to(state.latents.device))
    return sampler.run(state, until) if until > state.step else state
