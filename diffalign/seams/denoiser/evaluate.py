"""Evaluates passes: takes the rows that each needs, and runs plain passes together in one call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign.core import COND, UNCOND, Meter, Pass, StepInfo, UnsupportedModel
from diffalign.families.family import Family
from diffalign.seams.blocks.skip import skipped
from diffalign.seams.denoiser.cache import check_branches, check_rows, fixed_rows, keeps_both
from diffalign.seams.denoiser.cached_calls import CachedCalls
from diffalign.seams.denoiser.call import Denoise, DenoiserCall, PipelineCall
from diffalign.seams.denoiser.rows import prediction_of, take_arguments
from diffalign.seams.swap import original_class, unwrapped

Rows = Sequence[int]


@dataclass(frozen=True, slots=True)
class Branches:
    """Rows of each branch in the pipeline's call; empty where it has none."""

    cond: Rows
    uncond: Rows = ()

    def of(self, p: Pass) -> Rows:
        """Rows of the branch that ``p`` reads."""
        return self.cond if p.conditioned else self.uncond


class Evaluator:
    """Runs the denoiser with everything that techniques have put around it, and meters its rows."""

    def __init__(self, family: Family, meter: Meter, two_calls: bool = False) -> None:
        """``two_calls``: the pipeline calls its denoiser once for each branch."""
        self.family, self.meter = family, meter
        # outermost first
        self.middleware: list[Callable[[Denoise], Denoise]] = []
        # modules whose row counts must stay {B, 2B}
        self._fixed: dict[int, bool] = {}
        self.cached_calls = CachedCalls(two_calls)

    def run(
        self,
        call: PipelineCall,
        step: StepInfo,
        passes: tuple[Pass, ...],
        conditioned: tuple[bool, ...],
        arguments: dict[str, Any],
    ) -> Any:
        """One denoiser call; ``conditioned``: for each row of ``arguments``."""
        denoise: Denoise = functools.partial(_denoiser, call)
        for wrap in reversed(self.middleware):
            denoise = wrap(denoise)
        self.meter.charge(rows=len(conditioned))
        try:
            return denoise(DenoiserCall(call.denoiser, step, passes, conditioned), arguments)
        except RuntimeError as error:
            inside = self.middleware or passes[0].blocks is not None
            if inside and type(error).__module__.startswith("torch._dynamo"):
                raise UnsupportedModel(
                    f"{original_class(unwrapped(call.module)).__name__} is compiled as one graph, "
                    "in which no technique can act; compile the model without fullgraph=True."
                ) from error
            raise

    def passes(
        self, call: PipelineCall, step: StepInfo, passes: Sequence[Pass], branches: Branches
    ) -> tuple[Any, dict[Pass, Tensor]]:
        """The first call's output and the prediction of each pass.

        Plain passes go together in one call, in the pipeline's own order of branches; the others
        have a call of their own.
        """
        plain = [p for p in passes if not p.alone]
        plain.sort(key=lambda p: p.conditioned is (self.family.order == "uc"))
        template: Any = None
        preds: dict[Pass, Tensor] = {}
        if plain and branches.uncond and keeps_both(call.module):
            template, preds = self._both(call, step, plain, branches)
            plain = []
        elif plain:
            check_branches(call.module, len(passes))
        groups = [plain] if plain else []
        groups += [[p] for p in passes if p.alone]
        for group in groups:
            output = self._group(call, step, group, branches, preds)
            template = output if template is None else template
        return template, preds

    def _both(
        self, call: PipelineCall, step: StepInfo, passes: Sequence[Pass], branches: Branches
    ) -> tuple[Any, dict[Pass, Tensor]]:
        """Both branches for all images, whatever was asked: the model's cache counts on it."""
        order = [UNCOND, COND] if self.family.order == "uc" else [COND, UNCOND]
        preds: dict[Pass, Tensor] = {}
        output = self._group(call, step, order, branches, preds)
        selection = {}
        for p in passes:
            prediction = preds[COND if p.conditioned else UNCOND]
            selection[p] = prediction if p.rows is None else prediction[list(p.rows)]
        return output, selection

    def _group(
        self,
        call: PipelineCall,
        step: StepInfo,
        group: list[Pass],
        branches: Branches,
        preds: dict[Pass, Tensor],
    ) -> Any:
        """Run one group in one call and add its predictions to ``preds``."""
        # a compiled or cached model must not meet a third batch size: whole branches run, and the
        # rows that were asked for are picked afterwards
        whole = any(p.rows is not None for p in group) and self._rows_are_fixed(call.module)
        rows: list[int] = []
        sizes: list[int] = []
        for p in group:
            branch = branches.of(p)
            part = branch if p.rows is None or whole else [branch[i] for i in p.rows]
            rows += part
            sizes.append(len(part))
        arguments = call.arguments
        if rows != list(range(call.rows)):
            arguments = take_arguments(arguments, rows, call.rows, self.family)
        conditioned = tuple(p.conditioned for p, size in zip(group, sizes) for _ in range(size))
        if not group[0].alone:
            check_rows(call.module, len(rows), call.rows)
        module = call.module if group[0].module is None else group[0].module
        with self.cached_calls.around(module, group, len(rows), step):
            output = self.run(call, step, tuple(group), conditioned, arguments)
        predictions = prediction_of(output).split_with_sizes(sizes)
        for p, prediction in zip(group, predictions):
            picked = p.rows is not None and whole
            preds[p] = prediction[list(p.rows or ())] if picked else prediction
        return output

    def _rows_are_fixed(self, module: Any) -> bool:
        if id(module) not in self._fixed:
            self._fixed[id(module)] = fixed_rows(module)
        return self._fixed[id(module)]


def _denoiser(call: PipelineCall, evaluation: DenoiserCall, arguments: dict[str, Any]) -> Any:
    """The denoiser beneath every technique: that of the pass, or the pipeline's without the blocks
    that the pass skips."""
    # models take what they need out of lists and dictionaries, and a step may call them again
    arguments = {
        name: copy.copy(value) if type(value) in (list, dict) else value
        for name, value in arguments.items()
    }
    p = evaluation.passes[0]
    if p.module is not None:
        return p.module(**arguments)
    with nullcontext() if p.blocks is None else skipped(call.module, p.blocks):
        return call.original(**arguments)
