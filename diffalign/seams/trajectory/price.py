"""What a trajectory costs, from the plan alone: denoiser rows of one image at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffalign.core import AttentionTechnique, Guidance, Meter, StepInfo, Technique
from diffalign.core.types import Keywords, Pipeline
from diffalign.families import Family
from diffalign.seams.denoiser.cache import keeps_both
from diffalign.seams.denoiser.space import parametrisation_of
from diffalign.seams.plan import Plan, plan
from diffalign.seams.trajectory.call import Call
from diffalign.seams.trajectory.grid import Grid

# noise levels tried where the schedule is not known; of models that are not flows, the highest
LEVELS, HIGHEST = 64, 200.0


def rows_of(call: Call, techniques: Sequence[Technique], grid: Grid) -> tuple[int, ...]:
    """Largest number of rows of one image at each evaluation, with these techniques.

    A technique whose choice depends on the images is counted as if it had chosen nothing yet.
    Raises: ``UnsupportedModel`` where a technique cannot act on the pipeline.
    """
    planned = plan(call.pipe, call.family, techniques, (), call.of(call.least), Meter())
    repeats = _repeats(call.pipe, planned)
    steps = [_step(call, grid, index) for index in range(grid.count)]
    return tuple(_rows(call.pipe, planned, step, repeats) for step in steps)


def most_rows(
    pipe: Pipeline, family: Family, techniques: Sequence[Technique], options: Keywords, count: int
) -> int:
    """Largest number of rows of one image at any of ``count`` evaluations, for pipelines whose
    schedule is not known before they run: every noise level is tried, so it may be too high.

    Raises: ``UnsupportedModel`` where a technique cannot act on the pipeline.
    """
    planned = plan(pipe, family, techniques, (), options, Meter())
    repeats, total = _repeats(pipe, planned), max(count, LEVELS)
    places = [i / total for i in range(total)]
    flow = parametrisation_of(family, pipe.scheduler).flow
    levels = [1 - place if flow else HIGHEST ** (1 - 2 * place) for place in places]
    infos = [
        StepInfo(int(place * count), count, level, mix=family.mix)
        for place, level in zip(places, levels)
    ]
    return max(_rows(pipe, planned, info, repeats) for info in infos)


def _repeats(pipe: Pipeline, planned: Plan) -> bool:
    """Whether a technique gives conditioned rows a copy."""
    return any(
        technique.repeats(pipe, denoiser)
        for technique in planned.others
        if isinstance(technique, AttentionTechnique) and not technique.off
        for denoiser in planned.family.present(pipe)
    )


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


def _rows(pipe: Pipeline, planned: Plan, step: StepInfo, repeats: bool) -> int:
    if not planned.guidances:
        conditioned, others = 1, int(planned.opened)
        return conditioned * (1 + repeats) + others
    guidances = planned.guidances.values()
    return max(_guided(guidance, pipe, planned, step, repeats) for guidance in guidances)


def _guided(
    guidance: Guidance[Any], pipe: Pipeline, planned: Plan, step: StepInfo, repeats: bool
) -> int:
    passes = guidance.passes(step, guidance.init(1))
    conditioned = sum(p.conditioned for p in passes)
    others = len(passes) - conditioned
    if planned.opened and planned.family.mode == "sequential" and not conditioned:
        conditioned = 1  # one row shows the shape of what the pipeline gets for its first call
    modules = planned.family.present(pipe).values()
    if planned.opened and any(map(keeps_both, modules)):
        conditioned, others = max(conditioned, 1), max(others, 1)
    return conditioned * (1 + repeats) + others
