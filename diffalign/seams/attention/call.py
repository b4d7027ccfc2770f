"""One denoiser call as attention techniques see it, and what they may add around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from diffalign.core.attention import AttentionTechnique, Parts
from diffalign.seams.swap import Handler, in_place, intercepted

if TYPE_CHECKING:
    from diffalign.seams.denoiser.call import DenoiserCall
    from diffalign.seams.tokens.passage import Passage

Handlers = dict[Any, tuple[str, Handler]]
"""Object -> (method, its handler), as ``seams.swap.intercepted`` takes them."""


@dataclass(frozen=True, slots=True)
class CallView:
    """One denoiser call as its layers see it."""

    # attribute of the pipeline that holds the denoiser
    denoiser: str
    # techniques that act now, outermost first
    active: tuple[AttentionTechnique, ...]
    # for each row, whether it carries the prompt
    conditioned: tuple[bool, ...]
    # tokens of the prompt, padding included
    prompt: int
    # tokens that techniques put behind the prompt: name -> how many
    added: Mapping[str, int] = field(default_factory=dict)
    # rows that a technique added: (row, the row that repeats it with another text)
    copies: tuple[tuple[int, int], ...] = ()
    # (row, the row whose own text is its negative text), where nothing is added for it
    negatives: tuple[tuple[int, int], ...] = ()
    # positions in each row, empty where the family's rows are all alike
    row_parts: tuple[Parts, ...] = ()
    # what the pass of this call changes in chosen layers
    change: AttentionTechnique | None = None
    # the image in tokens, None where the change does not ask
    grid: tuple[int, int, int] | None = None
    # what happens to its image tokens, None where all are computed and nothing stays
    passage: Passage | None = None


class CallExtension(Protocol):
    """What a technique adds around each denoiser call of a generation."""

    def open(
        self, call: DenoiserCall, arguments: dict[str, Any], view: CallView
    ) -> tuple[DenoiserCall, dict[str, Any], CallView]:
        """The call with what the technique adds to it."""
        ...

    def close(self, output: Any, view: CallView) -> Any:
        """The model's output without what ``open`` added."""
        ...

    def handlers(self, running: RunningCall, denoisers: Mapping[str, Any]) -> Handlers:
        """Calls besides attention that must know what was added."""
        ...


class RunningCall:
    """Which denoiser call is running, for handlers of modules inside it."""

    def __init__(self, opaque: bool) -> None:
        # the call, None between calls
        self.view: CallView | None = None
        self.handlers: Handlers = {}
        # a compiler does not look into the handlers
        self.opaque = opaque

    def passage(self) -> Passage | None:
        """What happens to the image tokens of the call that is running."""
        return None if self.view is None else self.view.passage

    @contextmanager
    def at(self, view: CallView | None) -> Iterator[None]:
        """Within one denoiser call, or a part of it that is recomputed.

        That may happen in another thread or after the generation.
        """
        before, self.view = self.view, view
        handlers = (
            nullcontext() if in_place(self.handlers) else intercepted(self.handlers, self.opaque)
        )
        try:
            with handlers:
                yield
        finally:
            self.view = before
