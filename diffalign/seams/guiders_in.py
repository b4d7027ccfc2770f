"""Diffusers' guiders as techniques: theirs on classic pipelines."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.core import COND, UNCOND, Guidance, Pass, StepInfo, UnsupportedModel, option

INSTEAD = {
    "SkipLayerGuidance": "da.SkipLayerGuidance, or da.S2Guidance",
    "AutoGuidance": "da.AutoGuidance with a weaker model, or da.S2Guidance",
    "PerturbedAttentionGuidance": "da.PAG",
    "SmoothedEnergyGuidance": "da.SEG",
}


def as_technique(item: Any) -> Any:
    """A diffusers guider as a technique; everything else as it is, for the session to judge."""
    # an instance cannot exist before its module
    guiders = sys.modules.get("diffusers.guiders.guider_utils")
    if guiders is None or not isinstance(item, guiders.BaseGuidance):
        return item
    options = {key: value for key, value in item.config.items() if not key.startswith("_")}
    return DiffusersGuider(guider=type(item).__name__, options=options, original=item)


@dataclass(frozen=True, slots=True)
class GuiderState:
    """What a guider remembers, as a copy that nobody else holds."""

    guider: Any

    def select(self, rows: Sequence[int]) -> GuiderState:
        """The state of those images.

        Running averages are the only thing that diffusers' guiders keep per image.
        """
        guider = copy.deepcopy(self.guider)
        for value in vars(guider).values():
            if isinstance(average := getattr(value, "running_average", None), Tensor):
                value.running_average = average[list(rows)]
        return GuiderState(guider)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersGuider(Guidance[GuiderState]):
    """A guider of diffusers on a classic pipeline: its own ``forward`` on the two predictions.

    ``da.apply(pipe, ClassifierFreeGuidance(5.0))`` makes it. The guider is copied before every
    generation, so that no state leaks. Guiders that hook layers are refused: their hooks rest on
    the order of calls, and fail or have no effect on most models.
    Cost: passes that the guider asks for, 2 per step or 1.
    """

    guider: str = option(meaning="class in diffusers.guiders")
    options: Mapping[str, Any] = option(factory=dict, meaning="its configuration")
    original: Any = option(
        None, "the guider as an object, for classes of your own", saved="omitted"
    )

    def __post_init__(self) -> None:
        guider = self._fresh()
        base = sys.modules["diffusers.guiders.guider_utils"].BaseGuidance
        hooks = type(guider).prepare_models is not base.prepare_models
        instead = INSTEAD.get(self.guider, "a technique of diffalign")
        count = len(guider._input_predictions)
        if count > 2 and not hooks:
            raise UnsupportedModel(
                f"{self.guider} combines up to {count} predictions "
                f"({', '.join(guider._input_predictions)}), and only the first two exist here; use "
                f"{instead} instead."
            )
        if hooks:
            raise UnsupportedModel(
                f"{self.guider} changes layers inside the denoiser, which works on few models; use "
                f"{instead} instead."
            )

    @property
    def asked_scale(self) -> float | None:
        """The guider's own scale, where it has one."""
        guider = self._fresh()
        value = getattr(guider, "guidance_scale", None)
        shifted = bool(getattr(guider, "use_original_formulation", False))
        return None if value is None else float(value) + shifted

    @property
    def needs_uncond(self) -> bool:
        return bool(self._fresh().num_conditions > 1)

    def init(self, batch: int) -> GuiderState:
        return GuiderState(self._fresh())

    def passes(self, step: StepInfo, state: GuiderState) -> tuple[Pass, ...]:
        return tuple(p for p, _ in _prepared(copy.deepcopy(state.guider), step))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: GuiderState
    ) -> tuple[Tensor, GuiderState]:
        guider = copy.deepcopy(state.guider)
        prepared = _prepared(guider, step)
        if any(p not in preds for p, _ in prepared):
            return preds[COND], state  # the pipeline itself stops guiding here
        for p, batch in prepared:
            batch.noise_pred = preds[p]
        guided: Tensor = guider([batch for _, batch in prepared])[0]
        return guided.to(preds[COND].dtype), GuiderState(guider)

    def _fresh(self) -> Any:
        """The guider as it is before a run."""
        guider = copy.deepcopy(self.original) if self.original is not None else self._built()
        guider._step = guider._num_inference_steps = guider._timestep = None
        return guider

    def _built(self) -> Any:
        import diffusers.guiders

        cls = getattr(diffusers.guiders, self.guider, None)
        if cls is None:
            raise ValueError(
                f"diffusers has no guider {self.guider!r}; one of your own is given as an object, "
                "apply(pipe, guider)."
            )
        options = self.options
        return cls.from_config(json.loads(options) if isinstance(options, str) else dict(options))


def _prepared(guider: Any, step: StepInfo) -> list[tuple[Pass, Any]]:
    """The guider's own choice of passes.

    It picks from a pair of markers, 1 with the prompt and 0 without.
    """
    guider.set_state(
        step=step.index, num_inference_steps=step.count, timestep=torch.tensor(step.timestep)
    )
    batches = guider.prepare_inputs({"conditioned": (torch.tensor(1), torch.tensor(0))})
    return [(COND if bool(batch.conditioned) else UNCOND, batch) for batch in batches]
