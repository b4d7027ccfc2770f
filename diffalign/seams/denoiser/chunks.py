"""Pipelines that make a video chunk after chunk in one call: where one chunk ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.seams.denoiser.call import PipelineCall

if TYPE_CHECKING:
    from diffalign.families import Family
    from diffalign.seams.denoiser.tap import Generation


def reads_a_chunk(family: Family, call: PipelineCall) -> bool:
    """Whether a call of the denoiser predicts nothing and reads a finished chunk."""
    return family.remembers is not None and family.remembers(call.arguments)


def read_chunk(generation: Generation, call: PipelineCall) -> Any:
    """The pipeline reads a finished chunk into the memory of its model: as it is, without
    techniques. The next step is the first of a new chunk, of which nobody knows anything."""
    record, clock, start = generation.record, generation.clock, generation.start
    generation.meter.charge(rows=call.rows, joined=True)
    record.readings += 1
    if clock.timesteps:
        generation.loop.verify()
        record.earlier += clock.calls  # one evaluation for each step
        clock.timesteps, clock.calls = [], 0
        generation.step = None
        generation.states = dict(start.states) if start is not None else {}
    return call.original(**call.arguments)
