"""What diffalign knows of a model family: everything that the seams and techniques may ask.

A new family is one file beside this one that makes a ``Family``; ``families`` finds it there. Each
is a claim about the pipelines' source, which tests check against the real classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from diffalign.core import linear_mix
from diffalign.core.presets import Entry
from diffalign.core.types import Mix
from diffalign.families.arithmetic import rescale, same
from diffalign.families.layout import Grid, TokenPlaces, latent_grid
from diffalign.families.text import (
    HIDDEN,
    Argument,
    Encoder,
    SecondText,
    TextLayers,
    has_text_encoder,
)

if TYPE_CHECKING:
    from torch import Tensor

# (guided, conditional, value of the call argument) -> guided, both [B, ...]
Post = Callable[["Tensor", "Tensor", Any], "Tensor"]

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass(frozen=True, slots=True)
class PipelineOption:
    """A call argument through which the pipeline changes its own guidance.

    It is read, set to ``neutral`` and applied by us instead.
    """

    name: str
    # value at which the pipeline leaves the guided prediction alone
    neutral: Any
    # runs on the guided rows after the technique
    post: Post | None = None
    # (value, index, steps, time of the scheduler) -> whether guidance is over at this step
    stops: Callable[[Any, int, int, float], bool] | None = None


RESCALE = PipelineOption("guidance_rescale", 0.0, post=rescale)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """How the pipeline asks for its two branches and mixes them."""

    # "batched" (one call with both), "sequential" (two calls, the conditional first) or "single"
    mode: Literal["batched", "sequential", "single"] = "batched"
    # order of the batch: "uc" is unconditional first
    order: Literal["uc", "cu"] = "uc"
    # call argument with the scale, one for each denoiser
    gates: tuple[str, ...] = ("guidance_scale",)
    # the pipeline guides while its scale is above this
    on_above: float = 1.0
    # value of its scale that turns guidance off
    off: float = 1.0
    # value of its scale while a guidance of ours runs
    placeholder: float = 2.0
    # our scale minus its scale
    offset: float = 0.0
    # whether it reads its scale anew at each step, so that a callback may change it
    live_scale: bool = False
    # whether it guides only with a negative prompt
    needs_negative: bool = False
    # (conditional, unconditional, scale) -> guided, in its own order of operations
    mix: Mix = linear_mix
    # call arguments that it must not get while it does not guide
    only_guided: tuple[str, ...] = ()
    # whether it maps each prediction before it mixes them
    affine: bool = False
    # call arguments that change its guidance
    options: tuple[PipelineOption, ...] = ()
    # call argument -> why it cannot be combined with a guidance
    refuses: Mapping[str, str] = field(default_factory=dict)
    # pipeline -> why this object has nothing to guide, None when it has
    check: Callable[[Any], str | None] = field(default=lambda pipe: None)

    @property
    def embeddings(self) -> str:
        """The call argument with the encoded prompt."""
        return "prompt_embeds"

    def scale(self, native: float | None) -> float:
        """The guidance scale behind the pipeline's own scale; 1 where it does not guide."""
        return 1.0 if native is None or native <= self.on_above else float(native) + self.offset

    def native(self, scale: float) -> float:
        """The pipeline's own scale for a guidance scale; 1 turns guidance off."""
        return self.off if scale == 1.0 else scale - self.offset

    def negative_given(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        """Whether a call has what the pipeline needs, besides the scale, in order to guide."""
        names = ("negative_prompt", f"negative_{self.embeddings}")
        return not self.needs_negative or any(call.get(name) is not None for name in names)

    def missing_negative(self, pipe: Any, call: Mapping[str, Any]) -> str | None:
        """Why the unconditional branch cannot be formed in a call, None when it can."""
        negative = f"negative_{self.embeddings}"
        if call.get(self.embeddings) is None or call.get(negative) is not None:
            return None
        if has_text_encoder(pipe):
            return None
        return (
            f"guidance needs the unconditional branch; pass {negative} (there is no text encoder "
            "to make them)."
        )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """How the denoiser's arguments and predictions relate to what the scheduler works with."""

    # "scheduler" reads the scheduler's config; "flow" is a velocity whatever that says
    parametrisation: Literal["scheduler", "flow"] = "scheduler"
    # -1 where the network predicts the negated target
    target_sign: int = 1
    # (timestep of the denoiser, pipeline) -> timestep of the scheduler
    time: Callable[[float, Any], float] = field(default=lambda value, pipe: value)
    # noise level of the scheduler -> noise level as in StepInfo
    sigma: Callable[[float], float] = field(default=lambda value: value)
    # (guided prediction, what arrived at scheduler.step) -> what belongs there
    to_step: Callable[[Tensor, Tensor], Tensor] = same
    # arguments of the denoiser -> tokens of the prediction that reach the scheduler, where the
    # pipeline drops the others (those of reference images and given frames)
    seen: Callable[[Mapping[str, Any]], slice] | None = None
    # whether predictions are packed tokens [B, N, C], whose neighbours a filter cannot tell
    packed: bool = False
    # (denoiser, arguments of its call) -> the image in tokens; tokens behind those are padding or a
    # reference image
    grid: Callable[[Any, Mapping[str, Any]], Grid] = latent_grid
    # arguments of the first denoiser call -> scheduler timestep from which on each token of the
    # prediction reaches the latents, where given tokens are held back; None: all do at every step
    releases: Callable[[Mapping[str, Any]], Sequence[float] | None] | None = None
    # whether tensors come as Python lists with one per row
    lists: bool = False
    # arguments of a denoiser call -> whether it reads a finished chunk into the model's memory, so
    # that a new chunk begins behind it; None where a call of the pipeline makes one chunk
    remembers: Callable[[Mapping[str, Any]], bool] | None = None
    # denoiser argument besides those of texts -> axis of its rows, through its dictionaries
    axes: Mapping[str, int] = field(default_factory=dict)
    # denoiser arguments that are never split by rows
    shared: tuple[str, ...] = (
        "img_ids",
        "txt_ids",
        "image_rotary_emb",
        "attention_kwargs",
        "joint_attention_kwargs",
    )


@dataclass(frozen=True)
class Family(Predictions, Branches):
    """Pipeline classes that diffalign acts on in one way."""

    # of the model family; several values may share it
    name: str
    # exact names of pipeline classes of diffusers
    pipelines: tuple[str, ...] = ()
    # exact names of modular pipeline classes
    modular: tuple[str, ...] = ()
    # pipeline attributes that hold the denoisers
    denoisers: tuple[str, ...] = ("transformer",)
    # networks that run before the denoiser on the same rows; they skip what it skips
    companions: tuple[str, ...] = ("controlnet",)
    # text arguments of the denoiser, the one that attention sees first
    text: tuple[Argument, ...] = HIDDEN
    # how texts are encoded; None where diffalign does not know
    encoder: Encoder | None = None
    # attention layers that see text; None where diffalign does not know them or there are none
    attention: TextLayers | None = None
    # regular expression of the names of attention layers that see the image alone; None where
    # diffalign does not know them or there are none
    self_attention: str | None = None
    # where some image tokens can be left out; None where diffalign does not know or none can be
    tokens: TokenPlaces | None = None
    # how a second text is carried; None where it cannot be
    second_text: SecondText | None = None
    # class of a transformer block -> parameters of its forward that it returns, in that order
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # technique -> its published defaults for this family
    defaults: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    # technique, or "technique/option" when only that option is refused -> why, as a sentence
    refusals: Mapping[str, str] = field(default_factory=dict)

    @property
    def embeddings(self) -> str:
        return self.encoder.first if self.encoder is not None else "prompt_embeds"

    @property
    def row_axes(self) -> dict[str, int]:
        """Denoiser argument -> axis of its rows, for those where it is not the first."""
        rows = {argument.name: argument.rows for argument in self.text if argument.rows}
        return {**self.axes, **rows}

    def present(self, pipe: Any) -> dict[str, Any]:
        """The denoisers that a pipeline has, by attribute name."""
        modules = {name: getattr(pipe, name, None) for name in self.denoisers}
        return {name: module for name, module in modules.items() if module is not None}


def entries(
    source: str, when: Mapping[str, Any] | None = None, /, **values: Any
) -> tuple[Entry, ...]:
    """Defaults of one technique from one ``source``; ``when``: facts that must hold besides."""
    return tuple(Entry(option, value, source, when or {}) for option, value in values.items())
