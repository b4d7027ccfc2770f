"""How the pipeline is called in a run, and an image made again from its lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffalign.core import Meter, State, Technique
from diffalign.core.sampler import Sampler
from diffalign.core.search import Lineage
from diffalign.core.types import Pipeline
from diffalign.seams.trajectory.cached import CachedSampler
from diffalign.seams.trajectory.sampler import PipelineSampler


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

    def sampler(self, meter: Meter) -> PipelineSampler:
        """A sampler of this setting, not open yet."""
        call = {**self.call, "prompt": self.prompt}
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
        if move.step > state.step:
            state = sampler.run(state, move.step)
        if move.back is not None:
            state = sampler.renoise(state, move.back, [move.seed])
        else:
            state = state.reseed([move.seed])
    return state if state.finished else sampler.run(state)
