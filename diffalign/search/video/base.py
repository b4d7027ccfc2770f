"""What all expanders share: the session, the texts, what a call costs, and the first checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from diffalign.core import Meter, SessionError, UnsupportedModel
from diffalign.core.types import Keywords, Pipeline
from diffalign.families import FAMILIES, Family, family_of
from diffalign.seams.counted import counted
from diffalign.seams.denoiser.tap import Start
from diffalign.seams.guiders_in import as_technique
from diffalign.seams.plan import bind
from diffalign.seams.session import Session, active
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.price import most_rows
from diffalign.seams.trajectory.texts import Texts
from diffalign.search.video.expander import Branch, Prefix, Price

T = TypeVar("T")
# arguments of the pipeline that every expander sets
SET = (
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "num_videos_per_prompt",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)


class PipelineExpander(ABC):
    """An expander over an unmodified pipeline; run it in a ``with`` block.

    ``techniques`` act in every chunk, as in ``da.apply``; what they remember begins anew with each.
    ``call``: arguments of the pipeline, with one prompt. The texts are encoded once.
    """

    # exact names of the pipeline classes
    pipelines: ClassVar[tuple[str, ...]]
    exact_prefix: ClassVar[bool]
    # whether one call makes several videos
    batched: ClassVar[bool] = False
    # further arguments of the pipeline that the expander sets
    sets: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[object] = (),
        meter: Meter | None = None,
        **call: object,
    ) -> None:
        self.pipe, self.call = pipe, call
        self.techniques = tuple(map(as_technique, techniques))
        self.meter = Meter() if meter is None else meter
        cls = original_class(pipe)
        self.family = _family_of(cls, bool(self.techniques))
        bound = bind(cls, pipe, (), call)
        self.values, self.count = bound.values, bound.steps
        self._texts, self._most, self._is_open = Texts(), 0, False
        # the open session, None where the pipeline has no family
        self._session: Session | None = None
        self._check_call()

    def _check_call(self) -> None:
        """What cannot work, before anything is run."""
        name = type(self).__name__
        for argument in (*SET, *self.sets):
            if self.call.get(argument) is not None:
                raise ValueError(f"{name}({argument}=...) is set by the expander; leave it out.")
        prompt, embeds = self.call.get("prompt"), self.call.get("prompt_embeds")
        texts = [prompt] if isinstance(prompt, str) else prompt if prompt is not None else embeds
        if not isinstance(texts, list | tuple | Tensor) or len(texts) != 1:
            count = "none" if texts is None else getattr(texts, "__len__", lambda: "no text")()
            raise ValueError(f"{name} makes videos of one prompt; got {count}.")
        if self.count < 1:
            raise ValueError(
                f"{name}(num_inference_steps=...) must be at least 1; got {self.count}."
            )

    @property
    @abstractmethod
    def partition(self) -> tuple[int, ...]:
        """Frames that each chunk adds to the video."""

    @property
    def previews(self) -> bool:
        """Whether ``preview`` works."""
        return False

    @abstractmethod
    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        """What evaluations of one chunk of one video cost at most."""

    @abstractmethod
    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        """Frames [F, 3, H, W] in [0, 1], float32 on the CPU."""

    @abstractmethod
    def encode(self, clip: Tensor) -> Prefix:
        """A clip [F, 3, H, W] in [0, 1] as a prefix to go on from."""

    @abstractmethod
    def piece_shape(self, chunk: int) -> tuple[int | None, ...]:
        """Shape of the piece of a chunk, None where any length will do."""

    @abstractmethod
    def make(self, branches: Sequence[Branch]) -> list[Tensor]:
        """The piece of each branch, in one call where ``batched``; the branches are checked."""

    def look(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """``preview`` for checked branches, in one call where ``batched``."""
        pipeline, scheduler = original_class(self.pipe), original_class(self.pipe.scheduler)
        raise UnsupportedModel(
            f"{pipeline.__name__} with {scheduler.__name__} does not show what its steps predict, "
            "so chunks cannot be previewed; leave early pruning out."
        )

    def __enter__(self) -> Self:
        if self._is_open:
            raise SessionError("The expander is open already; leave its block first.")
        if self.family is not None:
            self._session = Session(self.pipe, self.techniques, self.meter).__enter__()
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, self._session, self._is_open = self._session, None, False
        if session is not None:
            session.close()

    def expand(self, branches: Sequence[Branch]) -> list[Prefix]:
        """The prefixes with one more chunk, in the order of ``branches``."""
        self.check(branches)
        pieces = self._by_call(branches, self.make)
        return [child(branch, piece) for branch, piece in zip(branches, pieces, strict=True)]

    def preview(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """The branches after evaluation ``step`` of the chunk, each with the frames that the model
        then predicts for it."""
        self.check(branches)
        first = branches[0].step
        if self.previews and not first < step < self.count:
            raise ValueError(
                f"preview(step={step}) must be above {first} and below {self.count}, the number of "
                "evaluations of a chunk."
            )
        return self._by_call(branches, lambda part: self.look(part, step))

    def check(self, branches: Sequence[Branch]) -> None:
        """Raise for branches that cannot be made together: ValueError, or ``SessionError`` outside
        the expander's block."""
        if not self._is_open:
            raise SessionError("The expander is not open; run it in a `with expander:` block.")
        if not branches:
            raise ValueError("An expander needs at least one branch; got none.")
        places = {(branch.chunk, branch.step) for branch in branches}
        if len(places) > 1:
            raise ValueError(
                "Branches of one call must be at one chunk and step; got (chunk, step) "
                f"{sorted(places)}."
            )
        chunk = branches[0].chunk
        if chunk >= len(self.partition):
            raise ValueError(
                f"The video has {len(self.partition)} chunks and the prefix has them all; give "
                "chunks=... or a larger num_frames to go on."
            )
        for branch in branches:
            self._check_prefix(branch.prefix)

    def _check_prefix(self, prefix: Prefix | None) -> None:
        for chunk, piece in enumerate(() if prefix is None else prefix.pieces):
            shape = self.piece_shape(chunk)
            alike = len(shape) == piece.ndim and all(
                size in (None, length) for size, length in zip(shape, piece.shape)
            )
            if not alike:
                raise ValueError(
                    f"Chunk {chunk} of the prefix is {list(piece.shape)} and must be "
                    f"{['any' if n is None else n for n in shape]} here: go on with an expander of "
                    "the same size and chunks, or encode(clip)."
                )

    def _by_call(
        self, branches: Sequence[Branch], run: Callable[[Sequence[Branch]], list[T]]
    ) -> list[T]:
        size = len(branches) if self.batched else 1
        parts = [branches[i : i + size] for i in range(0, len(branches), size)]
        return [item for part in parts for item in run(part)]

    @property
    def rows(self) -> int:
        """Largest number of denoiser rows of one video at one evaluation."""
        if not self._most:
            if self.family is None:
                scale = self.values.get("guidance_scale")
                self._most = 1 + (isinstance(scale, int | float) and scale > 1)
            else:
                outer = active(self.pipe)
                techniques = outer if self._is_open else (*outer, *self.techniques)
                options = self.call_of(1)
                self._most = most_rows(self.pipe, self.family, techniques, options, self.count)
        return self._most

    def call_of(self, videos: int) -> Keywords:
        """The call's arguments with a row of text for each of ``videos``."""
        options: Keywords = dict(self.call)
        for name, value in self.call.items():
            if name.endswith(("embeds", "attention_mask")) and isinstance(value, Tensor):
                options[name] = value.repeat_interleave(videos, 0)
            elif name in ("prompt", "negative_prompt") and value is not None:
                text = value if isinstance(value, str) else _only(value)
                options[name] = [text] * videos if self.batched else text
        return options

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around a call that runs the first evaluations of a chunk only: techniques are told of how
        many these are the first."""
        session = self._session
        if session is None:
            yield
            return
        session.start = Start(0, self.count, {})
        try:
            yield
        finally:
            session.start = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around each call of the pipeline: its texts are encoded once, its rows are counted."""
        with ExitStack() as stack:
            stack.enter_context(self._texts.remembered(self.pipe))
            if self.family is None:
                stack.enter_context(counted(self.pipe, self.meter))
            yield

    def check_clip(self, clip: Tensor) -> Tensor:
        """A clip as float32 on the CPU. Raises: ValueError for another shape, size or range."""
        height, width = self.values.get("height"), self.values.get("width")
        if not isinstance(clip, Tensor):
            raise TypeError(
                f"A clip must be a tensor [F, 3, H, W] with values in [0, 1]; got "
                f"{type(clip).__name__}."
            )
        if clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
            raise ValueError(
                f"A clip must be [F, 3, H, W] with values in [0, 1]; got {list(clip.shape)}."
            )
        if height and width and tuple(clip.shape[2:]) != (height, width):
            raise ValueError(
                f"The clip is {clip.shape[3]} x {clip.shape[2]} and the call makes {width} x "
                f"{height}; resize the clip, or give width=... and height=... of the clip."
            )
        values = clip.detach().to("cpu", torch.float32)
        if not bool(((values >= 0) & (values <= 1)).all()):
            low, high = float(values.min()), float(values.max())
            raise ValueError(f"A clip has values in [0, 1]; got {low:g} to {high:g}.")
        return values


def _only(texts: object) -> object:
    """The one entry of a list of texts."""
    (text,) = texts if isinstance(texts, list | tuple) else (texts,)
    return text


def _family_of(cls: type, needed: bool) -> Family | None:
    """The family of a pipeline class, None where there is none.

    Raises: ``UnsupportedModel`` with the reason where one is ``needed``.
    """
    registered = any(base.__name__ in FAMILIES for base in cls.__mro__)
    return family_of(cls) if registered or needed else None


def child(branch: Branch, piece: Tensor) -> Prefix:
    """The prefix that a branch becomes with its chunk."""
    before = branch.prefix or Prefix((), (), ())
    return Prefix(
        (*before.pieces, piece), (*before.path, branch.number), (*before.seeds, branch.seed)
    )


def generators_of(branches: Sequence[Branch]) -> list[torch.Generator]:
    """A generator on the CPU for each branch, from its seed."""
    return [torch.Generator().manual_seed(branch.seed) for branch in branches]


def first_chunks(
    partition: Sequence[int], chunks: int | None, name: str = "chunks"
) -> tuple[int, ...]:
    """The first ``chunks`` of a partition, None for all. Raises: ValueError for another number."""
    if chunks is None:
        return tuple(partition)
    if not 1 <= chunks <= len(partition):
        raise ValueError(f"{name} must be in 1 to {len(partition)}; got {chunks}.")
    return tuple(partition[:chunks])
