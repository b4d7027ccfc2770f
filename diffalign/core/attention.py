"""The contract of an attention technique: middleware around one layer's attention."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from diffalign.core.technique import Seam, Technique
from diffalign.core.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

K = TypeVar("K")
Parts = Mapping[str, slice]
"""Name -> positions. "prompt": the prompt's tokens among the keys; "image": the image tokens among
the queries. A technique that adds tokens adds their name."""


@dataclass(frozen=True, slots=True)
class Site:
    """One attention layer as a technique sees it, in one denoiser call."""

    # dotted module name
    layer: str
    # "cross" (text keys only), "joint" (text and image in one softmax) or "self"
    kind: Literal["self", "cross", "joint"]
    # positions by name, empty where they differ between rows; in joint attention among queries and
    # keys alike
    parts: Parts = field(default_factory=dict)
    # positions among the keys, where image tokens have keys and no queries; empty elsewhere
    key_parts: Parts = field(default_factory=dict)
    # then the positions in each row; empty where all rows are alike
    row_parts: tuple[Parts, ...] = ()
    # number of image queries
    tokens: int = 0
    # for each row, whether it carries the prompt
    conditioned: tuple[bool, ...] = ()
    # rows that a technique added: (row, the row that repeats it with another text)
    copies: tuple[tuple[int, int], ...] = ()
    # (row, the row whose own text is its negative text)
    negatives: tuple[tuple[int, int], ...] = ()
    # frames, height and width of the image in tokens of this layer, for techniques that read it;
    # tokens behind these are padding, or those of a reference image
    grid: tuple[int, int, int] | None = None

    @property
    def keys(self) -> Parts:
        """Positions by name among the keys of joint attention and of self-attention."""
        return self.key_parts or self.parts


class Attend(Protocol):
    """What stands below a technique at one layer: the next technique, or the user's attention."""

    @property
    def site(self) -> Site:
        """The layer as the next one sees it."""

    @property
    def mask(self) -> Tensor | None:
        """None, boolean (True = use) or additive, broadcastable to [B, A, N, L]."""

    @property
    def scale(self) -> float | None:
        """Of the scores; None is ``1 / sqrt(D)``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [B, A, N, D], ``k`` [B, A, L, D], ``v`` [B, A, L, any] -> [B, A, N, any]."""
        ...

    def part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Attention over a part of the keys [B, A, N, D] and the log-sum-exp of its scores
        [B, A, N]; None where what stands below cannot tell it."""
        ...

    def narrow(
        self,
        site: Site,
        rows: Sequence[int] | None = None,
        queries: Sequence[slice] | None = None,
        keys: Sequence[slice] | None = None,
    ) -> Attend:
        """The same layer for some rows and parts of queries and keys; ``site`` is what is left."""
        ...

    def kernel(self, op: str, key: Hashable, make: Callable[[], tuple[K, str]]) -> K:
        """A kernel chosen once per ``key`` and run; ``make`` returns it and why it was chosen."""
        ...


class AttentionTechnique(Technique):
    """Base of every attention technique; subclasses are frozen dataclasses.

    The order in which techniques act is ``order``, whatever order the user gives: lower is further
    out (NAG 0, PLADIS 1).
    """

    __slots__ = ()
    seam: ClassVar[Seam] = "attention"
    order: ClassVar[int] = 2
    # called at every text layer, also where ``selects`` is False, because it changes what they see
    everywhere: ClassVar[bool] = False
    # whether it reads ``Site.grid``
    spatial: ClassVar[bool] = False
    # patterns of layer names, None for every text layer; a field where users may choose
    layers: tuple[str, ...] | None = None

    def selects(self, site: Site) -> bool:
        """Whether it acts at this layer; only ``layer`` and ``kind`` of the site are known here."""
        return site.kind != "self" and matches(self.layers, site.layer)

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The layer's attention output [B, A, N, D], after norms and rotary embedding.

        ``q`` [B, A, N, D], ``k`` and ``v`` [B, A, L, D]. Call ``attend(q, k, v)`` never, once or
        twice; use ``attend.narrow`` before calling it with some of the rows, queries or keys.
        """
        raise NotImplementedError

    def repeats(self, pipe: Pipeline, denoiser: str) -> bool:
        """Whether it adds a row for each row that carries the prompt, in that denoiser."""
        return False

    def extension(self, generation: Any) -> Any:
        """What it adds around each denoiser call of a generation, None for nothing.

        Called once, before the pipeline starts. See ``CallExtension`` in ``seams/attention``.
        """
        return None


def matches(layers: tuple[str, ...] | None, name: str) -> bool:
    """Whether a dotted layer name fits one of the shell patterns ``layers``; None fits all."""
    return layers is None or any(fnmatchcase(name, pattern) for pattern in layers)
