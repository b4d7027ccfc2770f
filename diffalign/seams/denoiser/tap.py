"""One generation under a session, and one guided step of it from top to bottom.

The pipeline calls its denoiser (``denoise``); the guidance names the passes it needs (``passes``);
they are evaluated on exactly those rows (``evaluate``), combined (``combine``) and answered so that
the pipeline's own formula yields the guided prediction (``branches.py``). The pipeline then calls
``scheduler.step`` (``scheduler_step``), where the closed loop checks what arrived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffalign.core import (
    COND,
    Cancelled,
    Guidance,
    GuidanceMismatch,
    Meter,
    Pass,
    UnsupportedModel,
)
from diffalign.families import Family
from diffalign.seams.denoiser.branches import OneBatch, way_of
from diffalign.seams.denoiser.call import Denoise, PipelineCall, Step, pipeline_call
from diffalign.seams.denoiser.chunks import read_chunk, reads_a_chunk
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.closed_loop import ClosedLoop
from diffalign.seams.denoiser.combine import Combiner
from diffalign.seams.denoiser.evaluate import Branches, Evaluator
from diffalign.seams.denoiser.record import Record
from diffalign.seams.denoiser.rows import halves_equal, parameter_names
from diffalign.seams.denoiser.space import parametrisation_of
from diffalign.seams.plan import Plan
from diffalign.seams.report import Report
from diffalign.seams.swap import original_class


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Where a segment begins in its trajectory, and what earlier segments left."""

    # evaluations made before
    begin: int
    # evaluations of the whole trajectory, None for all that the scheduler has
    whole: int | None
    # technique -> its state, as ``Generation.states``
    states: dict[str, Any]
    # what stands around every evaluation of the generation, outside all techniques
    around: Callable[[Generation], Callable[[Denoise], Denoise]] | None = None


class Generation:
    """One call of the pipeline: what the taps on denoiser and scheduler do, and what they know."""

    def __init__(self, pipe: Any, plan: Plan, meter: Meter, start: Start | None = None) -> None:
        family = plan.family
        self.pipe, self.plan, self.meter, self.start = pipe, plan, meter, start
        self.record = Record(plan.resolved)
        self.clock = Clock(pipe.scheduler, family.mix, family.sigma)
        self.loop = ClosedLoop(pipe, family, self.clock)
        self.evaluator = Evaluator(family, meter, plan.opened and family.mode == "sequential")
        if start is not None and start.around is not None:
            self.evaluator.middleware.append(start.around(self))
        self.way = way_of(family.mode, plan.opened, bool(plan.guidances))
        self.combiner = Combiner(plan, parametrisation_of(family, pipe.scheduler), self.record)
        # technique -> its state; every entry has select(rows) or is None
        self.states: dict[str, Any] = dict(start.states) if start is not None else {}
        self.batch, self.cancelled = 0, False
        self.step: Step | None = None

    @property
    def family(self) -> Family:
        """What is known of the pipeline."""
        return self.plan.family

    def denoise(
        self,
        name: str,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The pipeline called its denoiser: evaluate what the guidance needs, and answer."""
        if self.cancelled:
            raise Cancelled("The generation was cancelled; the pipeline is as it was before.")
        call = pipeline_call(name, module, original, args, kwargs)
        if reads_a_chunk(self.family, call):
            return read_chunk(self, call)
        guidance: Any = self.plan.guidances.get(name)
        return self.way.answer(self, call, self.step or self.begin(call, guidance), guidance)

    def begin(self, call: PipelineCall, guidance: Guidance[Any] | None) -> Step:
        """A new step: which one, at which noise level, for how many images."""
        if not self.clock.timesteps:
            self._start_clock(call)
            if guidance is not None and self.plan.guidance_name not in self.states:
                self.states[self.plan.guidance_name] = guidance.init(self.batch)
        self.combiner.at(self.clock.time, call, self.states)
        info = self.clock.now(self.combiner.converter(call, self.clock.sigma, self.batch))
        self.record.sigma.setdefault(self.record.number(info), info.sigma)
        self.step = Step(info, self.combiner.shape(call))
        return self.step

    def passes(self, guidance: Guidance[Any], step: Step) -> tuple[Pass, ...]:
        """What this step needs; the conditional pass alone where the pipeline itself would stop."""
        info = step.info
        for option in self.family.options:
            value = self.plan.options[option.name]
            if option.stops is not None and option.stops(
                value, info.index, info.count, info.timestep
            ):
                return (COND,)
        return guidance.passes(info, self.states[self.plan.guidance_name])

    def evaluate(
        self, call: PipelineCall, step: Step, passes: Sequence[Pass], branches: Branches
    ) -> Any:
        """Run ``passes`` and note their predictions in ``step``; the first call's output."""
        output, preds = self.evaluator.passes(call, step.info, passes, branches)
        step.preds.update(preds)
        return output

    def combine(self, guidance: Guidance[Any], step: Step) -> Tensor:
        """The guided prediction [B, ...]: the technique's rule, then the pipeline's own options."""
        name = self.plan.guidance_name
        step.guided, self.states[name] = self.combiner.combine(guidance, step, self.states[name])
        return step.guided

    def scheduler_step(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``scheduler.step`` was called: check what arrived, then advance the clock."""
        if self.plan.guidances:
            names = parameter_names(original_class(self.pipe.scheduler), "step")
            arguments = {**dict(zip(names, args)), **kwargs}
            guided = algebraic = None
            if self.step is not None:
                guided, algebraic = self.step.guided, self.step.algebraic
            self.loop.check(guided, algebraic, arguments["model_output"], arguments["sample"])
        self.clock.calls += 1
        self.step = None
        return original(*args, **kwargs)

    def accompany(
        self,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A companion network, such as a ControlNet, was called before the denoiser."""
        if isinstance(self.way, OneBatch):
            return self.way.accompany(self, module, original, args, kwargs)
        return original(*args, **kwargs)

    def report(self) -> Report:
        """The finished generation, without the columns of its log, which stay on the device."""
        self.loop.verify()
        begin = self.start.begin if self.start is not None else 0
        if self.clock.timesteps and self.clock.calls == begin:
            raise GuidanceMismatch(
                f"{type(self.pipe).__name__} called its denoiser but never scheduler.step, so no "
                "step could be told from another. Is the scheduler wrapped in an object of its own?"
            )
        evaluations, order = self.record.earlier + self.clock.calls - begin, self.clock.order
        facts = self.record.facts(self.meter, self.batch, evaluations, order)
        if self.start is None:  # a segment may well lie outside a window
            facts["notes"] += self.record.idle(self.plan.guidances.values(), self.clock.count)
        extras, name = {}, self.plan.guidance_name
        for denoiser, guidance in self.plan.guidances.items() if name in self.states else ():
            if shown := guidance.extras(self.states[name]):
                extras[denoiser] = shown
        return Report(pipeline=original_class(self.pipe).__name__, extras=extras, **facts)

    def _start_clock(self, call: PipelineCall) -> None:
        """The first denoiser call: read the scheduler's tables and the number of images."""
        names = ("timestep", "t", "timesteps")
        time = next((call.arguments[name] for name in names if name in call.arguments), None)
        name = type(self.pipe).__name__
        if time is None:
            raise UnsupportedModel(f"{name}: the denoiser was called without a timestep.")
        # given frames have earlier times
        latest = float(time.max()) if isinstance(time, Tensor) else float(time)
        first = self.family.time(latest, self.pipe)
        if self.start is not None:
            begin, whole = self.start.begin, self.start.whole
            self.clock.start(first, None, begin=begin, whole=whole, offset=0)
        else:
            self.clock.start(first, self.pipe.__dict__.get("_num_timesteps"))
        self.record.first = self.clock.sigmas[self.clock.offset]
        self.combiner.begin(call)
        both = self.plan.opened and self.family.mode == "batched"
        self.batch = call.rows // 2 if both else call.rows
        if both and (call.rows % 2 or not halves_equal(call.latents)):
            raise UnsupportedModel(
                f"{name} did not run both branches in one batch although its "
                f"guidance was switched on (the denoiser got {call.rows} rows). Is this model "
                "distilled? Then there is nothing to guide; use NAG."
            )
