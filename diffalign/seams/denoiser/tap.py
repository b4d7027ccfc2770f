"""One generation under a session: the tap on the denoiser, the check at the scheduler, and the
bookkeeping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.core import (
    COND,
    UNCOND,
    Cancelled,
    Meter,
    Pass,
    StepInfo,
    UnsupportedModel,
    Windowed,
)
from diffalign.core.window import never_acted
from diffalign.families.family import Family
from diffalign.seams.denoiser import space
from diffalign.seams.denoiser.branch_log import BranchLog
from diffalign.seams.denoiser.cache import cache_context, empty_cache, fixed_rows
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.closed_loop import ClosedLoop
from diffalign.seams.denoiser.rows import (
    count_rows,
    doubled,
    halves_equal,
    parameter_names,
    prediction_of,
    take_arguments,
    with_prediction,
)
from diffalign.seams.report import Report
from diffalign.seams.swap import original_class


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One denoiser call as attention and block techniques see it: ``conditioned[r]`` says whether
    row r carries the prompt."""

    denoiser: str
    step: StepInfo
    passes: tuple[Pass, ...]
    conditioned: tuple[bool, ...]


Denoise = Callable[[Evaluation, dict[str, Any]], Any]


class Technique(Protocol):
    """Anything that ``apply`` accepts. ``kind`` is "guidance", "attention" or "block"."""

    kind: str


class Run:
    """One call of the pipeline.

    What attention and block techniques use: ``middleware``, ``meter``, ``sigma`` (by step).
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        guidances: Mapping[str, Any],
        own: Mapping[str, Any],
        opened: bool,
        dummy: float,
    ) -> None:
        self.pipe, self.family, self.guidances, self.own, self.opened = (
            pipe,
            family,
            guidances,
            own,
            opened,
        )
        # an affine pipeline computes c + k' (c - u) or u + s (c - u); k is the weight of (c - u')
        # that the algebraic form must undo
        self.k = dummy - 1.0 + family.offset
        self.call: Mapping[str, Any] = {}
        self.meter = Meter()
        self.middleware: list[Callable[[Denoise], Denoise]] = []
        self.layers: dict[str, tuple[int, int]] = {}
        self.acted: dict[str, int] = {}
        self.resolved: dict[str, dict[str, tuple[Any, str]]] = {}
        self.notes: list[str] = []
        self.cancelled = False
        self.clock = Clock(pipe.scheduler, family.mix, family.sigma)
        self.loop = ClosedLoop(pipe, family, self.clock, self.k)
        self._step_names = parameter_names(original_class(pipe.scheduler), "step")
        self.kind = "flow" if family.parametrisation == "flow" else space.kind_of(pipe.scheduler)
        self.batch = 0
        self.state: Any = None
        self.began = perf_counter()
        self._step: StepInfo | None = None
        self._guided_steps: set[int] = set()
        self.sigma: dict[int, float] = {}
        self.log = BranchLog()
        self._fixed: dict[int, bool] = {}
        self._template: Any = None
        self._usual: tuple[Any, tuple[Pass, ...], list[int], tuple[bool, ...]] = (None, (), [], ())
        self._new_step()

    # -- the two intercepted calls

    def denoise(
        self,
        name: str,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The denoiser was called: evaluate what the guidance needs and answer so that the
        pipeline's formula gives the guided result."""
        if self.cancelled:
            raise Cancelled("The generation was cancelled; the pipeline is as it was before.")
        base: Any = module._modules.get(
            "_orig_mod", module
        )  # a compiled module's own; getattr would build an error message at every step
        kwargs = {**dict(zip(parameter_names(original_class(base)), args)), **kwargs}
        hidden = next(iter(kwargs.values()))
        if self._step is None:
            self._begin_step(kwargs, hidden)
        assert self._step is not None

        def call(
            passes: tuple[Pass, ...], conditioned: tuple[bool, ...], arguments: dict[str, Any]
        ) -> Any:
            inner: Denoise = functools.partial(self._raw, module, original)
            for wrap in reversed(self.middleware):
                inner = wrap(inner)
            assert self._step is not None
            self.meter.charge(rows=len(conditioned))
            return inner(Evaluation(name, self._step, passes, conditioned), arguments)

        guidance = self.guidances.get(name)
        if guidance is None:
            return self._pass_through(call, kwargs, hidden)
        if self.state is None:
            self.state = (guidance.init(self.batch),)
        if self.opened and self.family.mode == "batched":
            return self._batched(guidance, module, call, kwargs, hidden)
        if self.opened and self.family.mode == "sequential":
            return self._sequential(guidance, module, call, kwargs, hidden)
        wanted = self._wanted(guidance, module)
        if not all(p.conditioned for p in wanted):
            raise UnsupportedModel(
                f"{type(guidance).__name__} asks for {[p.name for p in wanted]}, but "
                f"{type(self.pipe).__name__} runs without an "
                "unconditional branch here; give a scale of 1 or a model whose guidance can be "
                "switched on."
            )
        output = self._evaluate(guidance, wanted, module, call, kwargs, hidden, range(self.batch))
        return with_prediction(output, self._combine(guidance))

    def _raw(
        self,
        module: Any,
        original: Callable[..., Any],
        evaluation: Evaluation,
        given: dict[str, Any],
    ) -> Any:
        """The denoiser beneath every technique; a pass with ``blocks`` is entered by its guidance,
        also when it is recomputed."""
        wanted = evaluation.passes[0]
        if wanted.blocks is None:
            return original(**given)
        with self.guidances[evaluation.denoiser].around(wanted, module):
            return original(**given)

    def accompany(
        self,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A ControlNet was called for both branches: where the denoiser will run the conditional
        one alone, so does it."""
        guidance = self.guidances.get(self.family.denoisers[0])
        given = {**dict(zip(parameter_names(original_class(module)), args)), **kwargs}
        hidden = next(iter(given.values()))
        total = count_rows(hidden)
        if (
            guidance is None
            or not self.opened
            or self.family.mode != "batched"
            or (self.batch and total != 2 * self.batch)
        ):
            return original(*args, **kwargs)
        if self._step is None:
            self._begin_step(given, hidden)
        if self.state is None:
            self.state = (guidance.init(self.batch),)
        if any(not p.conditioned or p.rows is not None for p in self._wanted(guidance, module)):
            return original(*args, **kwargs)
        rows = range(self.batch) if self.family.order == "cu" else range(self.batch, 2 * self.batch)
        output = original(
            **take_arguments(given, rows, total, self.family.shared, self.family.lists)
        )
        return doubled(output, self.batch)

    def scheduler_step(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``scheduler.step`` was called: check what arrived, then advance the clock."""
        if self.guidances:
            given = {**dict(zip(self._step_names, args)), **kwargs}
            self.loop.check(self._guided, self._algebraic, given["model_output"], given["sample"])
        self.clock.calls += 1
        self._new_step()
        return original(*args, **kwargs)

    # -- one step

    def _new_step(self) -> None:
        self._step = None
        self._guided: Tensor | None = None
        self._first: Tensor | None = None
        self._algebraic: Tensor | None = None
        self._first_input: Any = None
        self._preds: dict[Pass, Tensor] = {}
        self._calls = 0

    def _begin_step(self, kwargs: dict[str, Any], hidden: Any) -> None:
        total = count_rows(hidden)
        both = self.opened and self.family.mode == "batched"
        if not self.clock.timesteps:
            time = next(
                (kwargs[key] for key in ("timestep", "t", "timesteps") if key in kwargs), None
            )
            if time is None:
                raise UnsupportedModel(
                    f"{type(self.pipe).__name__}: the denoiser was called without a timestep."
                )
            first = (
                float(time.max()) if isinstance(time, Tensor) else float(time)
            )  # given frames have earlier times
            self.clock.start(
                self.family.time(first, self.pipe), self.pipe.__dict__.get("_num_timesteps")
            )
            self.batch = total // 2 if both else total
            if both and (total % 2 or not halves_equal(hidden)):
                raise UnsupportedModel(
                    f"{type(self.pipe).__name__} did not run both branches in one batch although "
                    "its guidance was switched on "
                    f"(the denoiser got {total} rows). Is this model distilled? Then there is "
                    "nothing to guide; use NAG."
                )
        self._shape = (
            tuple(hidden[0].shape) if isinstance(hidden, list) else tuple(hidden.shape[1:])
        )
        sigma, images = self.clock.sigma, self.batch if both else total

        def convert(
            value: Tensor, source: Any, target: Any, rows: Sequence[int] | None = None
        ) -> Tensor:
            x = torch.stack(list(hidden)) if isinstance(hidden, list) else hidden
            inputs = x[:images] if rows is None else x[list(rows)]
            return space.convert(
                value, inputs, sigma, self.kind, self.family.target_sign, source, target
            )

        self._step = self.clock.now(convert)
        self.sigma.setdefault(self._step.index, self._step.sigma)

    def _wanted(self, guidance: Any, module: Any) -> tuple[Pass, ...]:
        assert self._step is not None
        step = self._step
        for own in self.family.options:
            if own.stops is not None and own.stops(
                self.own[own.name], step.index, step.count, step.timestep
            ):
                return (COND,)
        wanted: tuple[Pass, ...] = guidance.passes(step, self.state[0])
        return wanted

    def _rows_are_fixed(self, module: Any) -> bool:
        if id(module) not in self._fixed:
            self._fixed[id(module)] = fixed_rows(module)
        return self._fixed[id(module)]

    def _batched(
        self, guidance: Any, module: Any, call: Any, kwargs: dict[str, Any], hidden: Any
    ) -> Any:
        if count_rows(hidden) != 2 * self.batch:
            raise UnsupportedModel(
                f"Expected {2 * self.batch} rows (both branches) at the denoiser; got "
                f"{count_rows(hidden)}."
            )
        wanted = self._wanted(guidance, module)
        first, second = range(self.batch), range(self.batch, 2 * self.batch)
        self._branches = (second, first) if self.family.order == "uc" else (first, second)
        output = self._evaluate(
            guidance, wanted, module, call, kwargs, hidden, self._branches[0], self._branches[1]
        )
        guided = self._combine(guidance)
        return with_prediction(output, torch.cat([guided, guided]))

    def _sequential(
        self, guidance: Any, module: Any, call: Any, kwargs: dict[str, Any], hidden: Any
    ) -> Any:
        """Conditional call first; its result is a placeholder that the second call fills with the
        guided prediction."""
        rows = range(self.batch)
        self._calls += 1
        if self._calls == 1:
            self._plan = self._wanted(guidance, module)
            self._first_input = hidden
            conditioned = tuple(p for p in self._plan if p.conditioned)
            if not conditioned:  # nothing is needed of this call but its shape, which one row tells
                if self._template is None:
                    self._evaluate(
                        guidance, (replace(COND, rows=(0,)),), module, call, kwargs, hidden, rows
                    )
                    self._preds.clear()
                like = prediction_of(self._template)
                self._first = like.new_zeros((self.batch, *like.shape[1:]))
                return with_prediction(self._template, self._first)
            output = self._evaluate(guidance, conditioned, module, call, kwargs, hidden, rows)
            if len(conditioned) == len(self._plan):
                self._first = self._combine(guidance)
            else:
                self._first = self._preds[conditioned[0]].clone()
            return with_prediction(output, self._first)
        if self._calls > 2 or not (hidden is self._first_input or _same(hidden, self._first_input)):
            raise UnsupportedModel(
                f"Expected a second call with the same latents at step {self._step}; got call "
                f"{self._calls}. Report this model."
            )
        if self._guided is not None:
            return self._answer(self._template, self._guided, self._guided)
        output = self._evaluate(
            guidance,
            tuple(p for p in self._plan if not p.conditioned),
            module,
            call,
            kwargs,
            hidden,
            (),
            rows,
        )
        cond = self._preds.get(COND, self._first)
        guided = self._combine(guidance)
        return self._answer(output, guided, cond)

    def _answer(self, output: Any, guided: Tensor, cond: Tensor | None) -> Any:
        """The second call's result: ``guided`` written into the first as well, or the algebraic
        form where that cannot work."""
        assert self._first is not None
        if cond is guided or self._first is guided:
            return with_prediction(output, guided)
        if self.family.affine or guided.requires_grad:
            assert cond is not None
            self._algebraic = cond
            return with_prediction(output, cond - (guided - cond) / self.k)
        self._first.copy_(guided)
        return with_prediction(output, guided)

    def _pass_through(self, call: Any, kwargs: dict[str, Any], hidden: Any) -> Any:
        """No guidance of ours: the pipeline's own call, metered and open to attention and block
        techniques."""
        assert self._step is not None
        total, self._calls = count_rows(hidden), self._calls + 1
        batched = self.opened and self.family.mode == "batched"
        if batched and total == 2 * self.batch:
            self._guided_steps.add(self._step.index)
            flags = (False,) * self.batch + (True,) * self.batch
            return call((COND, UNCOND), flags if self.family.order == "uc" else flags[::-1], kwargs)
        if total != self.batch:
            raise UnsupportedModel(
                f"Expected {self.batch} or {2 * self.batch} rows at the denoiser; got {total}."
            )
        # a callback may have ended the guidance, and SD3 skips layers in a third call: both with
        # the prompt alone
        conditioned = batched or self._calls == 1
        if not conditioned:
            self._guided_steps.add(self._step.index)
        return call((COND,) if conditioned else (UNCOND,), (conditioned,) * total, kwargs)

    def _evaluate(
        self,
        guidance: Any,
        wanted: tuple[Pass, ...],
        module: Any,
        call: Any,
        kwargs: dict[str, Any],
        hidden: Any,
        cond_rows: Sequence[int],
        uncond_rows: Sequence[int] = (),
    ) -> Any:
        """Run ``wanted`` on the rows of each branch: plain passes together in one call, passes with
        blocks in a call of their own."""
        total = count_rows(hidden)
        if (
            wanted is self._usual[0]
        ):  # the very passes of an earlier step that needed every row, in one call
            _, group_of_all, sizes, flags = self._usual
            self._reset_cache(module, total)
            output = call(group_of_all, flags, kwargs)
            self._preds.update(zip(group_of_all, prediction_of(output).split_with_sizes(sizes)))
            self._template = output
            return output
        plain = [p for p in wanted if p.blocks is None]
        plain.sort(key=lambda p: p.conditioned is (self.family.order == "uc"))
        template: Any = None
        groups: list[list[Pass]] = [plain] if plain else []
        groups += [[p] for p in wanted if p.blocks is not None]
        for group in groups:
            rows: list[int] = []
            # a compiled or cached model must not meet a third batch size: whole branches, and the
            # asked rows picked afterwards
            whole = any(p.rows is not None for p in group) and self._rows_are_fixed(module)
            for p in group:
                branch = cond_rows if p.conditioned else uncond_rows
                rows += list(branch) if p.rows is None or whole else [branch[i] for i in p.rows]
            given = (
                kwargs
                if rows == list(range(total))
                else take_arguments(kwargs, rows, total, self.family.shared, self.family.lists)
            )
            self._reset_cache(module, len(rows))
            sizes = [
                len(cond_rows if p.conditioned else uncond_rows)
                if p.rows is None or whole
                else len(p.rows)
                for p in group
            ]
            flags = tuple(p.conditioned for p, size in zip(group, sizes) for _ in range(size))
            with cache_context(module, group[0]) if group[0].blocks is not None else nullcontext():
                output = call(tuple(group), flags, given)
            template = output if template is None else template
            if (
                given is kwargs
                and group is plain
                and len(groups) == 1
                and all(p.rows is None for p in group)
            ):
                self._usual = (wanted, tuple(group), sizes, flags)
            prediction = prediction_of(output)
            for p, part in zip(group, prediction.split_with_sizes(sizes)):
                self._preds[p] = part if p.rows is None or not whole else part[list(p.rows)]
        self._template = template
        return template

    def _combine(self, guidance: Any) -> Tensor:
        assert self._step is not None
        step, preds = self._step, dict(self._preds)
        uncond = preds.get(UNCOND)
        if any(not p.conditioned for p in preds):
            self._guided_steps.add(step.index)
        guided, state = space.combined(guidance, preds, step, self.state[0])
        self.state = (state,)
        cond = preds.get(COND)
        if cond is not None and uncond is not None and len(preds) > 1:
            rows = next(p.rows for p in preds if p == UNCOND)
            picked = None if rows is None else list(rows)

            def part(value: Tensor) -> Tensor:
                return value if picked is None else value[picked]

            for own in self.family.options:
                if own.post is not None:
                    done = own.post(part(guided), part(cond).to(guided.dtype), self.own[own.name])
                    if picked is None:
                        guided = done
                    else:
                        guided = guided.clone()
                        guided[picked] = done
            if step.evaluation == 0:
                self._record(guidance, part(guided), part(cond), uncond, rows)
        self._guided = guided
        return guided

    def _record(
        self,
        guidance: Any,
        guided: Tensor,
        cond: Tensor,
        uncond: Tensor,
        rows: Sequence[int] | None,
    ) -> None:
        assert self._step is not None
        if (
            guided.shape[1:] != self._shape
        ):  # the latent, without the channels of a learned variance
            cut = (slice(None), *map(slice, self._shape))
            cond, uncond, guided = cond[cut], uncond[cut], guided[cut]
        where, pair = getattr(guidance, "space", "eps"), None
        if self.kind != where:
            pair = (
                self._step.convert(cond, "native", where, rows),
                self._step.convert(uncond, "native", where, rows),
            )
        self.log.record(self._step.index, cond, uncond, guided, pair)

    def _reset_cache(self, module: Any, rows: int) -> None:
        if self.__dict__.get("_last_rows", rows) != rows and getattr(
            module, "is_cache_enabled", False
        ):
            empty_cache(module)
        self._last_rows = rows

    def report(self) -> Report:
        """The finished run as a report, without the columns of its ``log``: those come off the
        device when somebody asks for them."""
        self.loop.verify()
        steps = self.clock.calls // self.clock.order + (self.clock.calls % self.clock.order > 0)
        idle = {
            type(g).__name__
            for g in self.guidances.values()
            if isinstance(g, Windowed) and not g.acts_in(self.sigma, steps)
        }
        self.notes += [never_acted(name, self.sigma) for name in idle if self.sigma]
        return Report(
            pipeline=original_class(self.pipe).__name__,
            images=self.batch,
            steps=steps,
            guided_steps=len(self._guided_steps),
            nfe=self.meter.rows / max(self.batch, 1),
            nfe_cfg=2.0 * self.clock.calls,
            rows=self.meter.rows,
            calls=self.meter.calls,
            decodes=self.meter.decodes,
            rewards=self.meter.rewards,
            seconds=perf_counter() - self.began,
            sigma=[self.sigma.get(s, float("nan")) for s in range(steps)],
            layers=dict(self.layers),
            acted=dict(self.acted),
            resolved=self.resolved,
            extras={
                name: extras
                for name, g in self.guidances.items()
                if (extras := g.extras(self.state[0]))
            }
            if self.state
            else {},
            notes=list(self.notes),
        )


def _same(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
    )
