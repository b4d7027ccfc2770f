"""From the predictions of a step to the guided one, and what the report notes about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core import COND, UNCOND, Guidance
from diffalign.seams.denoiser import space
from diffalign.seams.denoiser.call import PipelineCall, Step
from diffalign.seams.denoiser.record import Record
from diffalign.seams.plan import Plan

Picked = tuple[int, ...] | None
"""Images that a prediction holds, None for all."""


class Combiner:
    """The technique's rule on what reaches the scheduler, then the pipeline's own options."""

    def __init__(self, plan: Plan, parametrisation: space.Parametrisation, record: Record) -> None:
        self.plan, self.parametrisation, self.record = plan, parametrisation, record
        # tokens that reach the scheduler, None for all
        self.seen: slice | Tensor | None = None
        # timestep from which on each token does, None where that never changes
        self.releases: Tensor | None = None

    def begin(self, call: PipelineCall) -> None:
        """The first call of the run: which tokens reach the scheduler."""
        family = self.plan.family
        if family.seen is not None and call.denoiser:
            self.seen = family.seen(call.arguments)
        if family.releases is not None and call.denoiser:
            times = family.releases(call.arguments)
            self.releases = None if times is None else torch.tensor(times)

    def at(self, time: float, call: PipelineCall, states: dict[str, Any]) -> None:
        """A step begins: the tokens that reach the scheduler from here on, and the technique's
        state for them."""
        if self.releases is None:
            return
        released, before = self.releases >= time - 1e-3, self.seen
        if isinstance(before, Tensor) and len(before) == int(released.sum()):
            return
        self.seen = released.nonzero().squeeze(1).to(call.latents.device)
        name = self.plan.guidance_name
        if before is not None and name in states:
            states[name] = _for_tokens(states[name], before, self.seen)

    def combine(self, guidance: Guidance[Any], step: Step, state: Any) -> tuple[Tensor, Any]:
        """The guided prediction [B, ...] of a step, and the technique's next state."""
        whole = preds = step.preds
        if self.seen is not None:  # no rule may count what the pipeline drops
            preds = {p: prediction[:, self.seen] for p, prediction in whole.items()}
        if any(not p.conditioned for p in preds):
            self.record.guided_steps.add(self.record.number(step.info))
        guided, state = space.combined(guidance, preds, step.info, state)
        if self.seen is not None:
            guided = self._with_dropped(guidance, step, guided)
        if COND in whole and UNCOND in whole:
            rows = next(p.rows for p in whole if p == UNCOND)
            guided = self._with_options(guided, whole[COND], rows)
            if step.info.evaluation == 0:
                shown = guided if self.seen is None else guided[:, self.seen]
                self._log(guidance, step, (preds[COND], preds[UNCOND], shown), rows)
        return guided, state

    def converter(self, call: PipelineCall, sigma: float, images: int) -> Callable[..., Tensor]:
        """What ``StepInfo.convert`` is at this step, for the latents of ``call``."""
        latents, seen, parametrisation = call.latents, self.seen, self.parametrisation

        def convert(
            value: Tensor, source: Any, target: Any, rows: Sequence[int] | None = None
        ) -> Tensor:
            x = torch.stack(list(latents)) if isinstance(latents, list) else latents
            x = x if seen is None else x[:, seen]
            inputs = x[:images] if rows is None else x[list(rows)]
            return parametrisation.convert(value, inputs, sigma, source, target)

        return convert

    def shape(self, call: PipelineCall) -> tuple[int, ...]:
        """Shape of one image's latent as far as it reaches the scheduler."""
        if isinstance(call.latents, list):
            return tuple(call.latents[0].shape)
        latents = call.latents if self.seen is None else call.latents[:1, self.seen]
        return tuple(latents.shape[1:])

    def _with_dropped(self, guidance: Guidance[Any], step: Step, guided: Tensor) -> Tensor:
        """``guided`` beside the tokens that the pipeline drops.

        Those are mixed plainly, because the pipeline's own rescaling counts them.
        """
        preds = step.preds
        plain = next(iter(preds.values()))
        if COND in preds and UNCOND in preds and len(preds[COND]) == len(preds[UNCOND]):
            scale = guidance.asked_scale
            plain = step.info.mix(preds[COND], preds[UNCOND], 1.0 if scale is None else scale)
        whole = guided.new_zeros((len(guided), *plain.shape[1:]))
        if len(plain) == len(guided):
            whole.copy_(plain)
        whole[:, self.seen] = guided
        return whole

    def _with_options(self, guided: Tensor, cond: Tensor, rows: Picked) -> Tensor:
        """``guided`` after the pipeline's own changes (rescale, renorm, cap) to its guided rows."""
        for option in self.plan.family.options:
            if option.post is None:
                continue
            value = self.plan.options[option.name]
            if rows is None:
                guided = option.post(guided, cond.to(guided.dtype), value)
            else:
                picked = list(rows)
                changed = option.post(guided[picked], cond[picked].to(guided.dtype), value)
                guided = guided.clone()
                guided[picked] = changed
        return guided

    def _log(
        self,
        guidance: Guidance[Any],
        step: Step,
        predictions: tuple[Tensor, Tensor, Tensor],
        rows: Picked,
    ) -> None:
        """Note how far the branches are apart and how strongly the step is guided."""
        cond, uncond, guided = predictions
        if rows is not None:
            cond, guided = cond[list(rows)], guided[list(rows)]
        if guided.shape[1:] != step.shape:  # the latent, without the channels of a learned variance
            cut = (slice(None), *map(slice, step.shape))
            cond, uncond, guided = cond[cut], uncond[cut], guided[cut]
        pair, info, where = None, step.info, guidance.cosine_space
        if self.parametrisation.kind != where:
            pair = (
                info.convert(cond, "native", where, rows),
                info.convert(uncond, "native", where, rows),
            )
        self.record.log.record(self.record.number(info), cond, uncond, guided, pair)


def _for_tokens(state: Any, before: Any, after: Tensor) -> Any:
    """A technique's state with zeros for the tokens that are new: tensors [B, tokens, ...]."""
    if not dataclasses.is_dataclass(state) or isinstance(state, type):
        return state
    places = torch.searchsorted(after, before)
    changed = {}
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == len(before):
            wider = value.new_zeros((len(value), len(after), *value.shape[2:]))
            wider[:, places] = value
            changed[f.name] = wider
    return dataclasses.replace(state, **changed) if changed else state
