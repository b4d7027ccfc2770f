"""The two doors between our techniques and diffusers' guiders: theirs on classic pipelines, ours on
modular ones."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffalign.core import COND, UNCOND, Context, Pass, Space, StepInfo, UnsupportedModel

INSTEAD = {
    "SkipLayerGuidance": "da.SkipLayerGuidance, or da.S2Guidance",
    "AutoGuidance": "da.S2Guidance",
    "PerturbedAttentionGuidance": "da.S2Guidance",
    "SmoothedEnergyGuidance": "da.S2Guidance",
}


def guider(technique: Any, pipe: Any, *, denoiser: str | None = None) -> Any:
    """``technique`` as a guider for a modular pipeline:
    ``pipe.update_components(guider=da.guider(da.AdaptiveGuidance(), pipe))``.

    ``technique``: a guidance; ``scale=None`` takes the scale of the guider that ``pipe`` has now.
    ``denoiser``: the component it serves when there are two (``guider_2=da.guider(technique, pipe,
    denoiser="transformer_2")``). Families: Stable Diffusion XL and 3, Wan, Qwen-Image. Modular
    pipelines run passes one after another, so the saving of a skipped pass is a whole call.
    Raises: UnsupportedModel for another pipeline, TypeError for a technique that is not a guidance.
    """
    from diffalign.seams.guiders_out import TechniqueGuider

    return TechniqueGuider(technique).bind(pipe, denoiser)


def as_technique(given: Any) -> Any:
    """``given``, or a diffusers guider as a technique; everything else passes through for the
    session to judge."""
    guiders = sys.modules.get(
        "diffusers.guiders.guider_utils"
    )  # an instance cannot exist before its module
    if guiders is None or not isinstance(given, guiders.BaseGuidance):
        return given
    options = {key: value for key, value in given.config.items() if not key.startswith("_")}
    return DiffusersGuider(guider=type(given).__name__, options=options, given=given)


@dataclass(frozen=True, slots=True)
class GuiderState:
    """What a guider remembers, as a copy that nobody else holds."""

    guider: Any

    def select(self, rows: Sequence[int]) -> GuiderState:
        """The state of those images: running averages are the only thing that diffusers' guiders
        keep per image."""
        chosen = copy.deepcopy(self.guider)
        for value in vars(chosen).values():
            if isinstance(average := getattr(value, "running_average", None), Tensor):
                value.running_average = average[list(rows)]
        return GuiderState(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersGuider:
    """A guider of diffusers on a classic pipeline: its own ``forward`` on the two predictions, in
    the model's parametrisation.

    ``da.apply(pipe, ClassifierFreeGuidance(5.0))`` makes it. ``guider``, ``options``: class in
    ``diffusers.guiders`` and its configuration; the object that was given is copied before every
    generation, so that no state leaks. Guiders that hook layers are refused: their hooks rest on
    the order of calls, and fail or have no effect on most models.
    Cost: passes that the guider asks for, 2 per step or 1.
    """

    kind: ClassVar[str] = "guidance"
    combine_space: ClassVar[Space] = "native"

    guider: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: InitVar[Any] = None
    live: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self, given: Any) -> None:
        if given is None:
            import diffusers.guiders

            cls = getattr(diffusers.guiders, self.guider, None)
            if cls is None:
                raise ValueError(
                    f"diffusers has no guider {self.guider!r}; one of your own is given as an "
                    "object, apply(pipe, guider)."
                )
            given = cls.from_config(
                json.loads(self.options) if isinstance(self.options, str) else dict(self.options)
            )
        object.__setattr__(self, "live", given)
        base = sys.modules["diffusers.guiders.guider_utils"].BaseGuidance
        if (
            type(self.live).prepare_models is not base.prepare_models
            or len(self.live._input_predictions) > 2
        ):
            instead = INSTEAD.get(self.guider, "a technique of diffalign")
            raise UnsupportedModel(
                f"{self.guider} changes layers inside the denoiser, which works on few models; "
                f"use {instead} instead."
            )

    @property
    def scale(self) -> float | None:
        """The guider's own scale, where it has one."""
        value = getattr(self.live, "guidance_scale", None)
        return (
            None
            if value is None
            else float(value) + float(getattr(self.live, "use_original_formulation", False))
        )

    @property
    def needs_uncond(self) -> bool:
        return bool(self._fresh().num_conditions > 1)

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        return self, {}

    def extras(self, state: GuiderState) -> dict[str, Any]:
        return {}

    def init(self, batch: int) -> GuiderState:
        return GuiderState(self._fresh())

    def passes(self, step: StepInfo, state: GuiderState) -> tuple[Pass, ...]:
        return tuple(wanted for wanted, _ in self._prepared(copy.deepcopy(state.guider), step))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: GuiderState
    ) -> tuple[Tensor, GuiderState]:
        made = copy.deepcopy(state.guider)
        prepared = self._prepared(made, step)
        if any(wanted not in preds for wanted, _ in prepared):
            return preds[COND], state  # the pipeline itself stops guiding here
        for wanted, batch in prepared:
            batch.noise_pred = preds[wanted]
        guided: Tensor = made([batch for _, batch in prepared])[0]
        return guided.to(preds[COND].dtype), GuiderState(made)

    def _fresh(self) -> Any:
        made = copy.deepcopy(self.live)
        made._step = made._num_inference_steps = made._timestep = None
        return made

    def _prepared(self, made: Any, step: StepInfo) -> list[tuple[Pass, Any]]:
        """The guider's own choice of passes: it picks from a pair of markers, 1 with the prompt and
        0 without."""
        made.set_state(
            step=step.index, num_inference_steps=step.count, timestep=torch.tensor(step.timestep)
        )
        batches = made.prepare_inputs({"conditioned": (torch.tensor(1), torch.tensor(0))})
        return [(COND if bool(batch.conditioned) else UNCOND, batch) for batch in batches]
