"""A technique as a guider of diffusers' modular pipelines: named passes instead of counted ones,
nothing stale between runs."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from diffalign.core import COND, UNCOND, Context, Meter, Pass, StepInfo, UnsupportedModel
from diffalign.core.registry import from_config, name_of, to_config
from diffalign.families import table as registry
from diffalign.families.family import Family
from diffalign.seams.denoiser import space
from diffalign.seams.denoiser.cache import fixed_rows
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.rows import count_rows, parameter_names, take_arguments
from diffalign.seams.report import Report
from diffalign.seams.swap import intercepted, original_class

FAMILIES: dict[str, Family] = {
    "StableDiffusionXLModularPipeline": registry.SDXL,
    "StableDiffusion3ModularPipeline": registry.SD3,
    "WanModularPipeline": registry.WAN,
    "Wan22ModularPipeline": registry.WAN,
    "QwenImageModularPipeline": registry.QWEN,
}


class TechniqueGuider(BaseGuidance):  # type: ignore[misc]  # diffusers has no types
    """``pipe.update_components(guider=da.guider(technique, pipe))``; made by ``guider``, saved and
    loaded like every guider.

    ``report()``: what the last run did and cost. After ``from_pretrained`` it must be bound:
    ``guider.bind(pipe)``. Raises ``UnsupportedModel`` for pipelines it does not know and where a
    pass needs a negative prompt that is not there.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers asks for a list)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, technique: Any) -> None:
        super().__init__()
        self.technique: Any = (
            from_config(technique) if isinstance(technique, Mapping) else technique
        )
        if getattr(self.technique, "kind", "") != "guidance":
            raise TypeError(
                f"A guider takes a guidance such as da.AdaptiveGuidance(); got {technique!r}. "
                "Others act on classic pipelines."
            )
        self.register_to_config(technique=to_config(self.technique))
        self._pipe: Callable[[], Any] = lambda: None
        self._made: Any = self.technique
        self._plan: tuple[Pass, ...] | None = None
        self._entered = ExitStack()
        self._last = -1
        self._report = Report()

    def bind(self, pipe: Any, denoiser: str | None = None) -> TechniqueGuider:
        """Learn scheduler, scale and blocks from ``pipe``; ``denoiser``: the component this guider
        serves, None is the family's first."""
        name = type(pipe).__name__
        if name not in FAMILIES:
            raise UnsupportedModel(
                f"{name} is not a modular pipeline that diffalign knows; it knows "
                f"{', '.join(FAMILIES)}."
            )
        self._family = FAMILIES[name]
        self._denoiser = denoiser or self._family.denoisers[0]
        if getattr(pipe, self._denoiser, None) is None:
            raise UnsupportedModel(
                f"{name} has no component {self._denoiser!r}; load the components before making "
                "the guider."
            )
        slot = "guider_2" if self._denoiser.endswith("_2") else "guider"
        self._own_scale = float(getattr(getattr(pipe, slot, None), "guidance_scale", 1.0))
        self._pipe = weakref.ref(pipe)
        self._made = self.technique
        if getattr(self.technique, "scale", 0.0) is None:
            self._made = dataclasses.replace(self.technique, scale=self._own_scale)
        return self

    def report(self) -> Report:
        """The last run; an empty report before the first."""
        return self._report

    # -- what pipelines ask

    @property
    def guidance_scale(self) -> float:
        """For pipelines that embed the scale; 1 is off."""
        scale = getattr(self._made, "scale", None)
        return 1.0 if scale is None else float(scale)

    @property
    def num_conditions(self) -> int:
        """Passes of the step that is running; between runs, whether any step can need the negative
        prompt (2) or none (1)."""
        if self._plan is not None:
            return len(self._plan)
        return 2 if self._enabled and getattr(self._made, "needs_uncond", True) else 1

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last carries the prompt."""
        return self._plan is None or self._plan[max(self._count_prepared, 1) - 1].conditioned

    # -- one step, in the order in which pipelines call

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        pipe = self._pipe()
        if pipe is None:
            raise UnsupportedModel(
                "This guider knows no pipeline; make it with da.guider(technique, pipe), or call "
                "bind(pipe) after loading."
            )
        self._entered.close()
        self._plan = None
        if step <= self._last or self._last < 0:
            self._begin(pipe, step, num_inference_steps, timestep)
        self._last = self._clock.calls = step
        self._x: Tensor | None = None
        sigma = self._clock.now(lambda value, *_: value).sigma

        def convert(value: Tensor, source: Any, target: Any, rows: Any = None) -> Tensor:
            assert self._x is not None
            inputs = self._x if rows is None else self._x[list(rows)]
            return space.convert(
                value, inputs, sigma, self._kind, self._family.target_sign, source, target
            )

        self._info: StepInfo = self._clock.now(convert)

    def _begin(self, pipe: Any, step: int, steps: int, timestep: Any) -> None:
        """A new run: whatever the last one left is forgotten."""
        self._made, sources = self.technique.resolve(self._context(steps))
        self._clock = Clock(pipe.scheduler, self._family.mix, self._family.sigma)
        self._clock.start(float(timestep), None)
        self._clock.offset -= step
        self._clock.evaluations = len(self._clock.timesteps) - self._clock.offset
        self._clock.count = -(-self._clock.evaluations // self._clock.order)
        self._kind = (
            "flow" if self._family.parametrisation == "flow" else space.kind_of(pipe.scheduler)
        )
        self._technique_state: Any = None
        self._meter = Meter()
        options = {
            f.name: getattr(self._made, f.name)
            for f in dataclasses.fields(self._made)
            if f.init and not f.metadata.get("tensors")
        }
        named = {
            key: (value, sources.get(key, ""))
            for key, value in options.items()
            if value is not None
        }
        self._report = Report(
            pipeline=type(pipe).__name__, resolved={name_of(self.technique): named}
        )
        self._guided: set[int] = set()
        self._began = perf_counter()

    def _context(self, steps: int) -> Context:
        pipe = self._pipe()
        scheduler = pipe.scheduler
        return Context(
            pipeline=type(pipe).__name__,
            family=self._family.name,
            denoiser=self._denoiser,
            scheduler=type(scheduler).__name__,
            scale=self._own_scale,
            scale_source="pipeline default",
            steps=steps,
            batch=0,
            flow=space.kind_of(scheduler) == "flow",
            order=int(getattr(scheduler, "order", 1)),
            module=getattr(pipe, self._denoiser),
        )

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        pairs = [value if isinstance(value, tuple) else (value, None) for value in data.values()]
        self._choose(pairs)
        assert self._plan is not None
        return [self._prepare_batch(data, 0 if p.conditioned else 1, p.name) for p in self._plan]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        names = [
            value if isinstance(value, tuple) else (value, None) for value in input_fields.values()
        ]
        self._choose(
            [
                tuple(None if name is None else getattr(data, name, None) for name in pair)
                for pair in names
            ]
        )
        assert self._plan is not None
        return [
            self._prepare_batch_from_block_state(
                input_fields, data, 0 if p.conditioned else 1, p.name
            )
            for p in self._plan
        ]

    def _choose(self, pairs: list[tuple[Any, ...]]) -> None:
        """The passes of this step, given each input with and without the prompt."""
        if self._technique_state is None:
            self._batch = next(count_rows(value) for value, _ in pairs if isinstance(value, Tensor))
            self._technique_state = (self._made.init(self._batch),)
        plan = self._made.passes(self._info, self._technique_state[0]) if self._enabled else (COND,)
        if not all(p.conditioned for p in plan) and all(negative is None for _, negative in pairs):
            raise UnsupportedModel(
                f"{type(self.technique).__name__} needs the unconditional pass, and the pipeline "
                "has no negative prompt embeddings. Pass "
                "negative_prompt_embeds, or put the guider into the pipeline before the text "
                "encoder runs."
            )
        self._plan = plan

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        assert self._plan is not None
        call = functools.partial(self._denoise, self._plan[self._count_prepared - 1], denoiser)
        self._entered = ExitStack()
        self._entered.enter_context(intercepted({denoiser: ("__call__", call)}))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._entered.close()

    def _denoise(
        self,
        wanted: Pass,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The denoiser's call of one pass: only the rows it needs, without the blocks it skips."""
        try:
            given = {
                **dict(
                    zip(parameter_names(original_class(getattr(module, "_orig_mod", module))), args)
                ),
                **kwargs,
            }
            hidden = next(iter(given.values()))
            if self._x is None:
                self._x = hidden
            total = count_rows(hidden)
            if wanted.rows is not None and not fixed_rows(module):
                given, total = (
                    take_arguments(
                        given, wanted.rows, total, self._family.shared, self._family.lists
                    ),
                    len(wanted.rows),
                )
            self._meter.charge(rows=total)
            if wanted.blocks is None:
                return original(**given)
            with self._made.around(wanted, module):
                return original(**given)
        except BaseException:
            self._entered.close()  # the pipeline will not come to cleanup_models
            raise

    def forward(self, **predictions: Tensor) -> GuiderOutput:
        """Predictions by the name of their pass -> the guided one, in the model's own
        parametrisation."""
        assert self._plan is not None
        plan, self._plan = self._plan, None
        preds = {p: predictions[p.name] for p in plan}
        for p in plan:
            if p.rows is not None and len(preds[p]) != len(p.rows):
                preds[p] = preds[p][list(p.rows)]
        guided = preds[COND] if not self._enabled else self._combine(preds)
        cond = preds.get(COND, guided)
        return GuiderOutput(pred=guided, pred_cond=cond, pred_uncond=preds.get(UNCOND))

    def _combine(self, preds: Mapping[Pass, Tensor]) -> Tensor:
        guided, state = space.combined(self._made, preds, self._info, self._technique_state[0])
        self._technique_state = (state,)
        if any(not p.conditioned for p in preds):
            self._guided.add(self._info.index)
        made = self._report
        made.images, made.steps, made.guided_steps = (
            self._batch,
            self._info.index + 1,
            len(self._guided),
        )
        made.rows, made.calls, made.nfe = (
            self._meter.rows,
            self._meter.calls,
            self._meter.rows / self._batch,
        )
        made.nfe_cfg = 2.0 * (self._last + 1)
        made.seconds = perf_counter() - self._began
        made.sigma += [self._info.sigma] * (made.steps - len(made.sigma))
        return guided
