"""The guider that carries a technique: passes are named, and nothing is stale between runs."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from diffalign.core import (
    COND,
    UNCOND,
    AttentionTechnique,
    Context,
    Guidance,
    Meter,
    Pass,
    StepInfo,
    UnsupportedModel,
)
from diffalign.core.option import with_scale
from diffalign.core.registry import from_config, to_config
from diffalign.families import Family, modular_families
from diffalign.seams.activity import Activity
from diffalign.seams.attention.attach import Attachment, layers_for
from diffalign.seams.blocks.skip import skipped
from diffalign.seams.denoiser import space
from diffalign.seams.denoiser.cache import fixed_rows
from diffalign.seams.denoiser.call import DenoiserCall, pipeline_call
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.record import Record
from diffalign.seams.denoiser.rows import count_rows, take_arguments
from diffalign.seams.plan import context_of, resolve
from diffalign.seams.report import Report
from diffalign.seams.swap import intercepted


@dataclass(frozen=True, slots=True)
class _Binding:
    """The pipeline that a guider serves."""

    pipe: Callable[[], Any]
    family: Family
    # component with the denoiser
    denoiser: str
    # guidance scale of the guider that the pipeline had before
    scale: float

    def context(self, steps: int) -> Context:
        """What the technique sees; raises where the pipeline is gone."""
        pipe = self.pipe()
        context = context_of(pipe, self.family, self.denoiser)
        return dataclasses.replace(
            context,
            pipe=None,
            scale=self.scale,
            scale_source="pipeline default",
            steps=steps,
        )


@dataclass(slots=True)
class _Run:
    """One run of the pipeline, and the step of it that is going on."""

    technique: Guidance[Any]
    family: Family
    clock: Clock
    parametrisation: space.Parametrisation
    record: Record
    meter: Meter = field(default_factory=Meter)
    # state of the technique, from the first inputs on
    state: Any = None
    batch: int = 0
    step: StepInfo = field(default_factory=lambda: StepInfo(0, 1, 0.0))
    # input of the first denoiser call of the step
    latents: Tensor | None = None
    # the layers that a pass changes, from the first such pass on
    attachment: Attachment | None = None
    # passes of the step, None between steps
    passes: tuple[Pass, ...] | None = None

    @classmethod
    def of(
        cls, technique: Guidance[Any], binding: _Binding, step: int, steps: int, time: Any
    ) -> _Run:
        """A new run that begins at ``step``: whatever the last one left is forgotten."""
        resolved: dict[str, Any] = {}
        guidance = resolve(technique, binding.context(steps), resolved)
        scheduler, family = binding.pipe().scheduler, binding.family
        clock = Clock(scheduler, family.mix, family.sigma)
        clock.start(float(time), None, begin=step)
        parametrisation = space.parametrisation_of(family, scheduler)
        return cls(guidance, family, clock, parametrisation, Record(resolved))

    def at(self, step: int) -> None:
        """A new step begins."""
        self.passes = self.latents = None
        self.clock.calls = step
        sigma = self.clock.sigma

        def convert(value: Tensor, source: Any, target: Any, rows: Any = None) -> Tensor:
            x = self.latents
            assert x is not None, "predictions are converted after the denoiser has run"
            inputs = x if rows is None else x[list(rows)]
            return self.parametrisation.convert(value, inputs, sigma, source, target)

        self.step = self.clock.now(convert)

    def choose(self, pairs: list[tuple[Any, ...]], enabled: bool) -> tuple[Pass, ...]:
        """The passes of this step, given each input with and without the prompt."""
        if not self.batch:
            self.batch = next(count_rows(value) for value, _ in pairs if isinstance(value, Tensor))
            self.state = self.technique.init(self.batch)
        passes = self.technique.passes(self.step, self.state) if enabled else (COND,)
        without = all(negative is None for _, negative in pairs)
        if without and not all(p.conditioned for p in passes):
            raise UnsupportedModel(
                f"{type(self.technique).__name__} needs the unconditional pass, and the pipeline "
                "has no negative prompt embeddings. Pass negative_prompt_embeds, or put the guider "
                "into the pipeline before the text encoder runs."
            )
        self.passes = passes
        return passes

    def denoise(
        self,
        p: Pass,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The denoiser's call of one pass: only the rows it needs, without the blocks it skips."""
        call = pipeline_call("", module, original, args, kwargs)
        if self.latents is None:
            self.latents = call.latents
        arguments, rows = call.arguments, call.rows
        if p.rows is not None and not fixed_rows(module):
            arguments, rows = take_arguments(arguments, p.rows, rows, self.family), len(p.rows)
        self.meter.charge(rows=rows)
        if p.module is not None:
            return p.module(**arguments)
        if p.attention is not None:
            return self._changed(p, p.attention, module, original, arguments, rows)
        with nullcontext() if p.blocks is None else skipped(module, p.blocks):
            return original(**arguments)

    def _changed(
        self,
        p: Pass,
        change: AttentionTechnique,
        module: Any,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        rows: int,
    ) -> Any:
        """The denoiser's call of a pass that changes attention layers."""
        if self.attachment is None:
            activity: Activity[AttentionTechnique] = Activity((), self.record)
            layers = layers_for(self.family, "", module, (), (change,))
            self.attachment = Attachment(activity, self.family, {"": module}, layers, (change,))
        run = self.attachment.around(lambda _, given: original(**given))
        with self.attachment.installed():
            output = run(DenoiserCall("", self.step, (p,), (p.conditioned,) * rows), arguments)
        self.attachment.activity.finish({change: len(self.attachment.layers)}, complete=False)
        return output

    def combine(self, preds: Mapping[Pass, Tensor]) -> Tensor:
        """The guided prediction of the step."""
        guided, self.state = space.combined(self.technique, preds, self.step, self.state)
        self.record.sigma[self.step.index] = self.step.sigma
        if any(not p.conditioned for p in preds):
            self.record.guided_steps.add(self.step.index)
        return guided

    def report(self, pipeline: str) -> Report:
        """What the run has done and cost so far."""
        evaluations, order = self.clock.calls + 1, self.clock.order
        facts = self.record.facts(self.meter, self.batch, evaluations, order)
        return Report(pipeline=pipeline, **facts)


def _pairs(data: Any, input_fields: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Each input with and without the prompt, from the names of both or of the first alone."""
    names = [item if isinstance(item, tuple) else (item, None) for item in input_fields.values()]
    return [
        tuple(None if name is None else getattr(data, name, None) for name in pair)
        for pair in names
    ]


class TechniqueGuider(BaseGuidance):  # type: ignore[misc]  # diffusers has no types
    """A technique as a guider of modular pipelines; saved and loaded like every guider.

    ``guider`` makes it. ``report()`` says what the last run did and cost. After ``from_pretrained``
    it must be bound: ``guider.bind(pipe)``.
    Raises: ``UnsupportedModel`` for pipelines it does not know and where a pass needs a negative
    prompt that is not there.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers asks for a list)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, technique: Any) -> None:
        super().__init__()
        value = from_config(technique) if isinstance(technique, Mapping) else technique
        if not isinstance(value, Guidance):
            raise TypeError(
                f"A guider takes a guidance such as da.AdaptiveGuidance(); got {technique!r}. "
                "Others act on classic pipelines."
            )
        self.technique: Guidance[Any] = value
        # a technique given by position counts as a default there, which copies would not get
        self.register_to_config(technique=to_config(self.technique), _use_default_values=[])
        self._binding: _Binding | None = None
        self._run: _Run | None = None
        self._entered, self._report = ExitStack(), Report()

    def new(self, **kwargs: Any) -> TechniqueGuider:
        """A copy for the same pipeline, with other options where ``kwargs`` name some."""
        copy: TechniqueGuider = super().new(**kwargs)
        copy._binding = self._binding
        return copy

    def bind(self, pipe: Any, denoiser: str | None = None) -> TechniqueGuider:
        """Learn scheduler, scale and blocks from ``pipe``.

        ``denoiser``: the component this guider serves, None is the family's first.
        """
        name, families = type(pipe).__name__, modular_families()
        if name not in families:
            raise UnsupportedModel(
                f"{name} is not a modular pipeline that diffalign knows; it knows "
                f"{', '.join(families)}."
            )
        denoiser = denoiser or families[name].denoisers[0]
        if getattr(pipe, denoiser, None) is None:
            reason = f"{name} has no component {denoiser!r}"
            raise UnsupportedModel(f"{reason}; load the components before making the guider.")
        slot = "guider_2" if denoiser.endswith("_2") else "guider"
        scale = float(getattr(getattr(pipe, slot, None), "guidance_scale", 1.0))
        self._binding = _Binding(weakref.ref(pipe), families[name], denoiser, scale)
        self._run = None
        return self

    def report(self) -> Report:
        """The last run; an empty report before the first."""
        return self._report

    @property
    def _technique(self) -> Guidance[Any]:
        """The technique with the scale that the pipeline's own guider had."""
        if self._run is not None:
            return self._run.technique
        scale = self._binding.scale if self._binding is not None else 1.0
        technique: Guidance[Any] = with_scale(self.technique, scale)
        return technique

    @property
    def guidance_scale(self) -> float:
        """For pipelines that embed the scale; 1 is off."""
        scale = self._technique.asked_scale
        return 1.0 if scale is None else float(scale)

    @property
    def num_conditions(self) -> int:
        """Passes of the step that is running.

        Between runs: whether any step can need the negative prompt (2) or none (1).
        """
        if self._run is not None and self._run.passes is not None:
            return len(self._run.passes)
        return 2 if self._enabled and self._technique.needs_uncond else 1

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last carries the prompt."""
        passes = self._run.passes if self._run is not None else None
        return passes is None or passes[max(self._count_prepared, 1) - 1].conditioned

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        binding, run = self._binding, self._run
        if binding is None or binding.pipe() is None:
            raise UnsupportedModel(
                "This guider knows no pipeline; make it with da.guider(technique, pipe), or call "
                "bind(pipe) after loading."
            )
        self._entered.close()
        if run is None or step <= run.clock.calls:
            run = _Run.of(self.technique, binding, step, num_inference_steps, timestep)
            self._run, self._report = run, run.report(type(binding.pipe()).__name__)
        run.at(step)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        pairs = [value if isinstance(value, tuple) else (value, None) for value in data.values()]
        passes = self._running().choose(pairs, self._enabled)
        return [self._prepare_batch(data, 0 if p.conditioned else 1, p.name) for p in passes]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        pairs = _pairs(data, input_fields)
        return [
            self._prepare_batch_from_block_state(
                input_fields, data, 0 if p.conditioned else 1, p.name
            )
            for p in self._running().choose(pairs, self._enabled)
        ]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        passes = self._running().passes or ()
        call = functools.partial(self._denoise, passes[self._count_prepared - 1], denoiser)
        self._entered = ExitStack()
        self._entered.enter_context(intercepted({denoiser: ("__call__", call)}))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._entered.close()

    def _denoise(self, p: Pass, module: Any, original: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._running().denoise(p, module, original, args, kwargs)
        except BaseException:
            self._entered.close()  # the pipeline will not come to cleanup_models
            raise

    def forward(self, **predictions: Tensor) -> GuiderOutput:
        """Predictions by the name of their pass -> the guided one, as the model predicts."""
        run = self._running()
        preds = {p: predictions[p.name] for p in run.passes or ()}
        run.passes = None
        for p in preds:
            if p.rows is not None and len(preds[p]) != len(p.rows):
                preds[p] = preds[p][list(p.rows)]
        guided = preds[COND] if not self._enabled else run.combine(preds)
        self._report = run.report(self._report.pipeline)
        cond = preds.get(COND, guided)
        return GuiderOutput(pred=guided, pred_cond=cond, pred_uncond=preds.get(UNCOND))

    def _running(self) -> _Run:
        assert self._run is not None, "pipelines call set_state first"
        return self._run
