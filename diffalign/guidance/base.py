"""The contract of a guidance technique: name the passes you need, combine their predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self, TypeVar

from diffalign import core
from diffalign.core import Context, Pass, Space, StepInfo, Tensor

S = TypeVar("S")


class Guidance(core.Guidance[S]):
    """Base of every guidance; subclasses are frozen dataclasses whose first field is ``scale: float
    | None = None``.

    ``combine_space``: the space in which ``combine`` receives and returns predictions. "native"
    leaves the model's output as it is, which keeps plain mixing bit-identical; anything with a
    norm, a cosine or a projection names "eps" or "x0" and the tap converts.
    """

    __slots__ = ()
    kind: ClassVar[str] = "guidance"
    combine_space: ClassVar[Space] = "native"

    def __post_init__(self) -> None:
        pass

    @property
    def asked_scale(self) -> float | None:
        return getattr(self, "scale", None)

    @property
    def needs_uncond(self) -> bool:
        """False when no step can ask for the unconditional branch; the pipeline then does not even
        encode the negative prompt."""
        return True

    def refuses(self, *_: Any) -> None:
        return None

    @property
    def cosine_space(self) -> Any:
        return getattr(self, "space", None) or "eps"

    def init(self, batch: int) -> S:
        """State before the first step, for ``batch`` images."""
        return None  # type: ignore[return-value]

    def passes(self, step: StepInfo, state: S) -> tuple[Pass, ...]:
        """The evaluations this step needs; everything else is not run and not paid for."""
        raise NotImplementedError

    def combine(self, preds: Mapping[Pass, Tensor], step: StepInfo, state: S) -> tuple[Tensor, S]:
        """The guided prediction, same shape and dtype as the inputs, and the next state. Must not
        change its arguments.

        A solver's second evaluation of a step arrives with ``step.evaluation == 1``: decide at
        evaluation 0 only.
        """
        raise NotImplementedError

    def around(self, wanted: Pass, module: Any) -> AbstractContextManager[None]:
        """Entered around the denoiser call of a pass that names ``blocks``: here they are skipped."""
        from diffalign.seams.blocks.sites import skipped

        return skipped(module, wanted.blocks or ())

    def extras(self, state: S) -> dict[str, Any]:
        """What the report should say beyond scale and cosine, as JSON data, from the state after
        the last step."""
        return {}

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        """A copy with every ``None`` option filled in, and where each value came from (field ->
        source).

        Raises ``UnsupportedModel`` when the technique cannot act on this pipeline, scheduler or
        call.
        """
        if getattr(self, "scale", 0.0) is None:
            source = (
                "guidance scale of the call"
                if context.scale_source == "call"
                else "default of the pipeline"
            )
            return dataclasses.replace(self, scale=context.scale), {"scale": source}  # type: ignore[type-var]
        return self, {}
