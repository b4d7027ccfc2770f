"""The contract of an attention technique: middleware around one layer's scaled-dot-product
attention."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from diffalign.core import Context, StepInfo, Technique, Tensor
from diffalign.core.technique import Seam

if TYPE_CHECKING:
    from diffalign.seams.attention.intercept import Attend
    from diffalign.seams.attention.sites import Frame
    from diffalign.seams.denoiser.call import DenoiserCall
    from diffalign.seams.denoiser.tap import Generation


@dataclass(frozen=True, slots=True)
class Site:
    """One attention layer as a technique sees it, in one denoiser call.

    ``layer``: dotted module name. ``kind``: "cross" (text keys only), "joint" (text and image in
    one softmax) or "self". ``text``, ``image``: positions of the prompt's tokens among the keys,
    and of the image tokens among the queries; None if there are none, or if they differ between
    rows: then ``spans`` has (text, image) for each row. ``tokens``: number of image queries.
    ``conditioned``: for each row, whether it carries the prompt. ``negative``: positions of NAG's
    negative text among the keys (and among the queries of joint layers). ``twins``: pairs (row, its
    copy that carries NAG's negative text).
    """

    layer: str
    kind: Literal["self", "cross", "joint"]
    text: slice | None = None
    tokens: int = 0
    image: slice | None = None
    negative: slice | None = None
    conditioned: tuple[bool, ...] = ()
    spans: tuple[tuple[slice, slice], ...] | None = None
    twins: tuple[tuple[int, int], ...] = ()


class Stream(Protocol):
    """What a technique adds to the denoiser call around its layers."""

    def open(
        self, evaluation: DenoiserCall, kwargs: dict[str, Any], frame: Frame
    ) -> tuple[DenoiserCall, dict[str, Any], Frame]: ...
    def close(self, output: Any, frame: Frame) -> Any: ...
    def handlers(self, attachment: Any) -> dict[Any, tuple[str, Any]]: ...


class AttentionTechnique(Technique):
    """Base of every attention technique; subclasses are frozen dataclasses.

    ``order``: lower is further out, whatever order the user gives (NAG 0, PLADIS 1).
    ``everywhere``: called at every text layer, also where ``selects`` is False, because the
    technique changes what those layers see.
    """

    __slots__ = ()
    kind: ClassVar[str] = "attention"
    seam: ClassVar[Seam] = "attention"
    order: ClassVar[int] = 2
    everywhere: ClassVar[bool] = False

    @property
    def off(self) -> bool:
        """True when the options make the technique the identity; nothing is then installed."""
        return False

    def active(self, step: StepInfo) -> bool:
        """Whether it acts at this step; elsewhere the model runs as if the technique were not
        there."""
        return True

    def selects(self, site: Site) -> bool:
        """Whether it acts at this layer; only ``layer`` and ``kind`` of the site are known here."""
        return site.kind != "self"

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The layer's attention output [B, A, N, D] for q [B, A, N, D], k and v [B, A, L, D], after
        norms and rotary embedding.

        ``attend(q, k, v)`` is the next technique, or the user's own attention, with mask and scale
        bound; call it never, once or twice. Use ``attend.narrow`` before calling it with some of
        the rows, queries or keys.
        """
        raise NotImplementedError

    def stream(self, run: Generation) -> Stream | None:
        """What to add around each denoiser call of this run, None for nothing.

        Called once, before the pipeline starts.
        """
        return None

    def refuses(self, context: Context) -> str | None:
        """Why the technique cannot act on this pipeline object, None when it can."""
        from diffalign.families import family_of
        from diffalign.seams.swap import original_class

        family = family_of(original_class(context.pipe))
        if not family.text:
            return f"{family.name} has no text in its attention layers"
        if family.attention is None:
            return f"the attention layers of {family.name} are not known"
        return None

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        """A copy with every ``None`` option filled in, and where each value came from (field ->
        source)."""
        return self, {}


def matches(layers: tuple[str, ...] | None, name: str) -> bool:
    """Whether a dotted layer name fits one of the shell patterns ``layers``; None fits all."""
    return layers is None or any(fnmatchcase(name, pattern) for pattern in layers)


def check_layers(owner: str, layers: Any) -> None:
    """``layers`` must be None or a non-empty tuple of patterns."""
    if layers is not None and (
        not isinstance(layers, tuple) or not layers or not all(isinstance(p, str) for p in layers)
    ):
        raise ValueError(
            f"{owner}(layers=...) must be a tuple of patterns of layer names like "
            f"('up_blocks.*',), or None; got {layers!r}."
        )
