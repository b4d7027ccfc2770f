"""One call of a pipeline as an expander makes it: checked, under its techniques, counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor

from diffalign.core import Meter, SessionError
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


class ChunkCall:
    """A pipeline, one prompt and techniques, which act within the ``with`` block.

    ``call``: arguments of the pipeline, with one prompt. The texts are encoded once.
    """

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
        self.values: Keywords = dict(bound.values)
        self.count = bound.steps
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


def checked_clip(clip: Tensor, height: int | None, width: int | None) -> Tensor:
    """A clip as float32 on the CPU. Raises: ValueError for another shape, size or range."""
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
