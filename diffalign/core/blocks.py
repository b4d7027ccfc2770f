"""The contracts of techniques that act on blocks or on tokens of the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from diffalign.core.technique import Seam, Technique
from diffalign.core.types import StepInfo

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
Streams = tuple["Tensor", ...]
"""What flows through a block, in the order in which it returns them: image, or text and image."""


@dataclass(frozen=True, slots=True)
class BlockSite:
    """One transformer block of a denoiser."""

    # dotted module name
    name: str
    # parameters of its forward that it returns, in that order
    streams: tuple[str, ...]
    # why it is left alone unless asked for by name: "first", "last" or "context_pre_only"
    edge: str | None = None


class BlockTechnique(Technique, Generic[S]):
    """Middleware around chosen blocks. ``S`` is its state, which has ``select(rows)``, or None."""

    __slots__ = ()
    seam: ClassVar[Seam] = "blocks"

    def selects(self, site: BlockSite) -> bool:
        """Whether it acts at this block."""
        return site.edge is None

    def init(self, batch: int) -> S:
        """State before the first step, for ``batch`` images."""
        return None  # type: ignore[return-value]

    def around(
        self,
        block: Callable[[], Streams],
        streams: Streams,
        site: BlockSite,
        step: StepInfo,
        state: S,
    ) -> tuple[Streams, S]:
        """The outgoing streams and the next state, from the incoming ``streams`` [rows, ...].

        ``block()`` runs the block on them; call it once, or never to skip it.
        """
        raise NotImplementedError


class TokenTechnique(Technique, Generic[S]):
    """Computes some image tokens only.

    They are gathered after the patch embedding and scattered back after the output layer: a token
    that is left out keeps its last prediction. Attention keeps keys and values of all tokens.
    ``S`` is its state, which has ``select(rows)``, or None.
    """

    __slots__ = ()
    seam: ClassVar[Seam] = "tokens"

    def init(self, batch: int) -> S:
        """State before the first step, for ``batch`` images."""
        return None  # type: ignore[return-value]

    def remembers(self, step: StepInfo) -> bool:
        """Whether a later step may leave tokens out, so that keys and values of this one stay."""
        return True

    def choose(self, step: StepInfo, state: S) -> Tensor | None:
        """Indices [B, S], rising, of the image tokens this step computes; None for all.

        Every pass of the step computes those. Where a pass has no keys and values of the step
        before, it computes all.
        """
        raise NotImplementedError

    def observe(
        self,
        prediction: Tensor,
        computed: Tensor | None,
        grid: tuple[int, int, int],
        step: StepInfo,
        state: S,
    ) -> S:
        """The state after a step, once for each step at which it is ``active``.

        ``prediction`` [B, N, p]: the conditional one, in tokens; ``computed`` [B, S]: which of
        them this step computed, None for all; ``grid``: the image in tokens.
        """
        return state
