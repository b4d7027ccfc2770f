"""How a pipeline asks for its two branches, and how it is answered: one class for each way.

An answer is what makes the pipeline's own formula yield the guided prediction ``g``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from diffalign.core import COND, UNCOND, Guidance, Pass, UnsupportedModel
from diffalign.seams.denoiser.call import PipelineCall, Step, pipeline_call
from diffalign.seams.denoiser.evaluate import Branches
from diffalign.seams.denoiser.rows import (
    doubled,
    prediction_of,
    take_arguments,
    with_prediction,
)

if TYPE_CHECKING:
    from diffalign.seams.denoiser.tap import Generation


class Way(Protocol):
    """One way of calling the denoiser."""

    def answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        """What the pipeline gets for this call of its denoiser."""
        ...


class OneBatch:
    """One call of 2B rows with both branches: the answer holds ``g`` in both halves."""

    def answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        batch = generation.batch
        if call.rows != 2 * batch:
            raise UnsupportedModel(
                f"Expected {2 * batch} rows (both branches) at the denoiser; got {call.rows}."
            )
        first, second = range(batch), range(batch, 2 * batch)
        uncond_first = generation.family.order == "uc"
        branches = Branches(second, first) if uncond_first else Branches(first, second)
        passes = generation.passes(guidance, step)
        output = generation.evaluate(call, step, passes, branches)
        guided = generation.combine(guidance, step)
        return with_prediction(output, torch.cat([guided, guided]))

    def accompany(
        self,
        generation: Generation,
        module: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A network that runs before the denoiser on the same rows, such as a ControlNet.

        Where the denoiser will run the conditional branch alone, so does it.
        """
        family = generation.family
        guidance = generation.plan.guidances[family.denoisers[0]]
        call = pipeline_call("", module, original, args, kwargs)
        if generation.batch and call.rows != 2 * generation.batch:
            return original(*args, **kwargs)
        step = generation.step or generation.begin(call, guidance)
        passes = generation.passes(guidance, step)
        if any(not p.conditioned or p.rows is not None for p in passes):
            return original(*args, **kwargs)
        batch = generation.batch
        rows = range(batch) if family.order == "cu" else range(batch, 2 * batch)
        arguments = take_arguments(call.arguments, rows, call.rows, family)
        return doubled(original(**arguments), batch)


class TwoCalls:
    """Two calls of B rows, the conditional one first.

    The first answer is a buffer; the second call writes ``g`` into it and returns ``g``. Where the
    pipeline has consumed the first answer already, or gradients are on, the second answer is the
    value with which the pipeline's formula yields ``g``.
    """

    def __init__(self) -> None:
        # the answer of the first call
        self.first: Tensor = torch.empty(0)
        # latents of the first call, which the second must repeat
        self.latents: Any = None
        # an output of the denoiser, for its container
        self.template: Any = None
        self.passes: tuple[Pass, ...] = ()

    def answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        step.calls += 1
        if step.calls == 1:
            return self._first_answer(generation, call, step, guidance)
        if step.calls > 2 or not _same(call.latents, self.latents):
            raise UnsupportedModel(
                f"Expected a second call with the same latents at step {step.info}; got call "
                f"{step.calls}. Report this model."
            )
        if step.guided is not None:  # the first call was enough
            return self._second_answer(generation, self.template, step.guided, step.guided, step)
        rest = tuple(p for p in self.passes if not p.conditioned)
        branches = Branches((), range(generation.batch))
        output = self.template = generation.evaluate(call, step, rest, branches)
        cond = step.preds.get(COND, self.first)
        guided = generation.combine(guidance, step)
        return self._second_answer(generation, output, guided, cond, step)

    def _first_answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        self.passes, self.latents = generation.passes(guidance, step), call.latents
        branches = Branches(range(generation.batch))
        conditioned = tuple(p for p in self.passes if p.conditioned)
        if not conditioned:  # nothing is needed of this call but its shape, which one row tells
            if self.template is None:
                one = (dataclasses.replace(COND, rows=(0,)),)
                self.template = generation.evaluate(call, step, one, branches)
                step.preds.clear()
            sample = prediction_of(self.template)
            self.first = sample.new_zeros((generation.batch, *sample.shape[1:]))
            return with_prediction(self.template, self.first)
        output = self.template = generation.evaluate(call, step, conditioned, branches)
        if len(conditioned) == len(self.passes):
            self.first = generation.combine(guidance, step)
        else:
            self.first = step.preds[conditioned[0]].clone()
        return with_prediction(output, self.first)

    def _second_answer(
        self, generation: Generation, output: Any, guided: Tensor, cond: Tensor, step: Step
    ) -> Any:
        if cond is guided or self.first is guided:
            return with_prediction(output, guided)
        if generation.family.affine or guided.requires_grad:
            # the pipeline computes cond + k (cond - answer); with this answer that is ``guided``
            step.algebraic = cond
            return with_prediction(output, cond - (guided - cond) / generation.loop.k)
        self.first.copy_(guided)
        return with_prediction(output, guided)


class OneCall:
    """The pipeline does not guide here: one call of B rows, answered with ``g``."""

    def answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        if call.rows != generation.batch:
            raise UnsupportedModel(
                f"Expected {generation.batch} rows at the denoiser; got {call.rows}. If a callback "
                "raises the guidance scale, ask for guidance in the call too: it began without."
            )
        passes = generation.passes(guidance, step)
        if not all(p.conditioned for p in passes):
            raise UnsupportedModel(
                f"{type(guidance).__name__} asks for {[p.name for p in passes]}, but "
                f"{type(generation.pipe).__name__} runs without an unconditional branch here; give "
                "a scale of 1 or a model whose guidance can be switched on."
            )
        output = generation.evaluate(call, step, passes, Branches(range(generation.batch)))
        return with_prediction(output, generation.combine(guidance, step))


class Ended(OneCall):
    """A callback switched the pipeline's guidance off: the conditional branch runs alone."""

    def answer(
        self, generation: Generation, call: PipelineCall, step: Step, guidance: Guidance[Any]
    ) -> Any:
        output = generation.evaluate(call, step, (COND,), Branches(range(generation.batch)))
        return with_prediction(output, generation.combine(guidance, step))


class Untouched:
    """No guidance of ours: the pipeline's own calls, metered and open to other techniques."""

    def answer(self, generation: Generation, call: PipelineCall, step: Step, guidance: Any) -> Any:
        step.calls += 1
        batch, arguments = generation.batch, call.arguments
        batched = generation.plan.opened and generation.family.mode == "batched"
        if batched and call.rows == 2 * batch:
            generation.record.guided_steps.add(generation.record.number(step.info))
            flags, both = (False,) * batch + (True,) * batch, (UNCOND, COND)
            if generation.family.order == "cu":
                flags, both = flags[::-1], both[::-1]
            return generation.evaluator.run(call, step.info, both, flags, arguments)
        if call.rows != batch:
            raise UnsupportedModel(
                f"Expected {batch} or {2 * batch} rows at the denoiser; got {call.rows}."
            )
        # a callback may have ended the guidance, and SD3 skips layers in a third call: both with
        # the prompt alone
        conditioned = batched or step.calls == 1
        if not conditioned:
            generation.record.guided_steps.add(generation.record.number(step.info))
        passes = (COND,) if conditioned else (UNCOND,)
        flags = (conditioned,) * call.rows
        return generation.evaluator.run(call, step.info, passes, flags, arguments)


def way_of(mode: str, opened: bool, guided: bool) -> Way:
    """The way of this call: ``opened``: the pipeline runs both branches; ``guided``: by us."""
    if not guided:
        return Untouched()
    if not opened:
        return OneCall()
    ways: dict[str, type[Way]] = {"batched": OneBatch, "sequential": TwoCalls, "single": OneCall}
    return ways[mode]()


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
    )
