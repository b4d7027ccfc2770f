"""What a trajectory costs, from the plan alone: denoiser rows of one image at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffalign.core import AttentionTechnique, Guidance, Meter, StepInfo, Technique
from diffalign.seams.denoiser.cache import keeps_both
from diffalign.seams.plan import Plan, plan
from diffalign.seams.trajectory.call import Call
from diffalign.seams.trajectory.grid import Grid


def rows_of(call: Call, techniques: Sequence[Technique], grid: Grid) -> tuple[int, ...]:
    """Largest number of rows of one image at each evaluation, with these techniques.

    A technique whose choice depends on the images is counted as if it had chosen nothing yet.
    Raises: ``UnsupportedModel`` where a technique cannot act on the pipeline.
    """
    options = call.of(call.least)
    planned = plan(call.pipe, call.family, techniques, (), options, Meter())
    repeats = any(
        technique.repeats(call.pipe, denoiser)
        for technique in planned.others
        if isinstance(technique, AttentionTechnique) and not technique.off
        for denoiser in call.family.present(call.pipe)
    )
    steps = [_step(call, grid, index) for index in range(grid.count)]
    return tuple(_rows(call, planned, step, repeats) for step in steps)


def _step(call: Call, grid: Grid, index: int) -> StepInfo:
    sigma = call.family.sigma
    return StepInfo(
        index=index // grid.order,
        count=-(-grid.count // grid.order),
        sigma=sigma(grid.sigmas[index]),
        sigma_next=sigma(grid.following[index]),
        timestep=grid.timesteps[index],
        evaluation=index % grid.order,
        mix=call.family.mix,
    )


def _rows(call: Call, planned: Plan, step: StepInfo, repeats: bool) -> int:
    if not planned.guidances:
        conditioned, others = 1, int(planned.opened)
        return conditioned * (1 + repeats) + others
    return max(
        _guided(guidance, call, planned, step, repeats) for guidance in planned.guidances.values()
    )


def _guided(
    guidance: Guidance[Any], call: Call, planned: Plan, step: StepInfo, repeats: bool
) -> int:
    passes = guidance.passes(step, guidance.init(1))
    conditioned = sum(p.conditioned for p in passes)
    others = len(passes) - conditioned
    if planned.opened and call.family.mode == "sequential" and not conditioned:
        conditioned = 1  # one row shows the shape of what the pipeline gets for its first call
    modules = call.family.present(call.pipe).values()
    if planned.opened and any(map(keeps_both, modules)):
        conditioned, others = max(conditioned, 1), max(others, 1)
    return conditioned * (1 + repeats) + others
