"""What a technique may know about the pipeline before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign.core import presets
from diffalign.core.budget import Meter
from diffalign.core.identity import model_hash
from diffalign.core.option import CALL, FLOW
from diffalign.core.types import Pipeline

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True, slots=True)
class CallFacts:
    """The pipeline and how it is called."""

    # class name of the pipeline, without any swap of ours
    pipeline: str
    # name of the model family, such as "sd", "sdxl", "flux"
    family: str
    # attribute of the pipeline that holds the denoiser
    denoiser: str
    # class name of the scheduler
    scheduler: str
    # the pipeline's own guidance scale for this call, 1 where it does not guide
    scale: float
    # "call" or "pipeline default"
    scale_source: str
    # sampling steps asked for, 0 where they are not known
    steps: int
    # noise levels are in [0, 1]
    flow: bool = False
    # model evaluations per solver step
    order: int = 1
    # predictions are packed tokens [B, N, C], whose neighbours a filter cannot tell
    packed: bool = False
    # the negative prompt when it is one text, or one text for every image; None otherwise
    negative_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Context(CallFacts):
    """Facts from which a technique resolves the options that the user left to the model."""

    # the denoiser and the pipeline, None where a technique runs without one
    module: Module | None = field(default=None, compare=False, repr=False)
    pipe: Pipeline = field(default=None, compare=False, repr=False)
    # one text per image, empty where the call gives embeddings and outside a call
    prompts: tuple[str, ...] = ()
    # what the run is charged with, None outside a call
    meter: Meter | None = field(default=None, compare=False, repr=False)
    # defaults of techniques for this family: technique -> entries as in presets.json
    defaults: Mapping[str, tuple[presets.Entry, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )
    # "technique", or "technique/option" when only that option is refused -> why the family's models
    # cannot have it
    refusals: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    # where each looked-up option came from; filled while a technique resolves
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def facts(self) -> dict[str, object]:
        """What conditions of presets may name. The model is hashed only when a condition asks."""
        return {
            "family": self.family,
            "pipeline": self.pipeline,
            "scheduler": self.scheduler,
            "steps": self.steps,
            "scale": self.scale,
            "flow": self.flow,
            "in_channels": getattr(getattr(self.module, "config", None), "in_channels", None),
            "model": lambda: model_hash(self.module) if self.module is not None else None,
        }

    def look_up(self, name: str, source: str, **options: object) -> Any:
        """The value of the option ``name`` from ``source``, as ``auto`` takes it.

        ``options``: values of other options that conditions may name. ``sources[name]`` then says
        where the value came from. Raises LookupError where no preset fits.
        """
        if source == CALL:
            self.sources[name] = (
                "guidance scale of the call"
                if self.scale_source == "call"
                else "default of the pipeline"
            )
            return self.scale
        if source == FLOW:
            self.sources[name] = f"parametrisation of {self.scheduler}"
            return self.flow
        technique, _, option = source.partition("/")
        value, self.sources[name] = presets.preset(
            technique, option, self.facts() | options, self.defaults.get(technique, ())
        )
        return value

    def refusal(self, name: str, technique: object) -> str | None:
        """Why the family cannot have the technique registered as ``name``, None when it can."""
        for key, reason in self.refusals.items():
            owner, _, option = key.partition("/")
            if owner == name and (not option or getattr(technique, option)):
                return reason
        return None

    def fresh(self) -> Context:
        """A copy that has not looked anything up yet."""
        from dataclasses import replace

        return replace(self, sources={})
