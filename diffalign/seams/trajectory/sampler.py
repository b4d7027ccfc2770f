"""Trajectories of one pipeline, whole or in segments, through the pipeline's own ``__call__``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from diffalign.core import Meter, SessionError, State
from diffalign.core.sampler import Clamp, Mode, generator_states
from diffalign.core.types import Pipeline
from diffalign.core.words import Shift
from diffalign.seams.session import Session
from diffalign.seams.trajectory import gradient
from diffalign.seams.trajectory.facts import Facts
from diffalign.seams.trajectory.guards import check_noise
from diffalign.seams.trajectory.kernels import Kernel, check_kernel
from diffalign.seams.trajectory.running import (
    advance,
    generator_of,
    noised,
    redrawn,
    states_of,
)

# the session of the sampler that is open on a pipeline
_OPEN: weakref.WeakKeyDictionary[Pipeline, Session] = weakref.WeakKeyDictionary()


class PipelineSampler(Facts):
    """A ``Sampler`` over an unmodified pipeline; run it in a ``with`` block.

    ``call``: arguments of the pipeline, prompts included; ``latents``, ``generator`` and
    ``output_type`` are the sampler's. One prompt makes any number of images. Techniques stay
    active in every segment, and their states travel with ``State``. ``tiny``: a small decoder for
    previews, such as ``AutoencoderTiny``. ``shift``: added to the embeddings of some tokens of the
    prompt. A pipeline may have several samplers, one open at a time.
    Cost: the texts are encoded once; ``meter`` counts evaluations, denoiser rows and decodes.
    Raises: ``UnsupportedModel`` where the pipeline takes no start latents, for arguments that
    follow the position in the loop, and for a kernel that cannot act on the scheduler.
    """

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[Any] = (),
        meter: Meter | None = None,
        kernel: Kernel | None = None,
        tiny: Pipeline = None,
        shift: Shift | None = None,
        **call: Any,
    ) -> None:
        super().__init__(pipe, techniques, kernel, call, shift)
        self.meter = Meter() if meter is None else meter
        self.tiny = tiny
        self._session: Session | None = None

    def __enter__(self) -> Self:
        if _OPEN.get(self.pipe) is not None:
            raise SessionError(
                "Another sampler is open on this pipeline; leave its block before opening this one."
            )
        check_kernel(self.kernel, self.grid)
        session = Session(self.pipe, self.techniques, self.meter)
        session.__enter__()
        self._session = _OPEN[self.pipe] = session
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
            _OPEN.pop(self.pipe, None)

    @property
    def is_open(self) -> bool:  # type: ignore[override]
        """Whether the sampler's block runs."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session of the sampler's block. Raises ``SessionError`` outside it."""
        if self._session is None:
            raise SessionError("The sampler is not open; run it in a `with sampler:` block.")
        return self._session

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """The state before the first step, one image per seed.

        ``noise`` [B, ...] as the pipeline takes it; None: what the pipeline itself draws from
        ``torch.Generator().manual_seed(seed)``. The run is then the plain call with such
        generators, bit for bit.
        Raises: ValueError where there are no seeds, or ``noise`` has another shape.
        """
        if not len(seeds):
            raise ValueError("start(seeds=...) needs at least one seed; got none.")
        if noise is None:
            noise, generators = self.segments.draw(seeds)
            return State(noise, 0, self.count, states_of(generators))
        check_noise(self.segments, noise, len(seeds))
        latents = noise.to(self.segments.noise)
        return State(latents, 0, self.count, generator_states(seeds))

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue to evaluation ``until``, None for the end.

        ``drift`` [B, ...]: added to the mean of the first step, for a kernel of ours.
        Cost: the evaluations between.
        Raises: ValueError for an ``until`` that is not ahead and for reseeded images that come out
        alike; ``SessionError`` outside the sampler's block.
        """
        return advance(self, state, until, drift)

    def redraw(self, state: State, seeds: Sequence[int]) -> State:
        """Other outcomes of the step that made ``state``, one seed each, without an evaluation.

        They are bit for bit what ``reseed(seeds)`` before that step and the step itself give.
        Raises: ValueError where the last step drew nothing, or its kernel does not say what.
        """
        return redrawn(self, state, seeds)

    def renoise(self, state: State, to: int, seeds: Sequence[int]) -> State:
        """The images noised again to the earlier evaluation ``to``; they go on from there.

        With level ``(a, s)`` of the state and ``(a', s')`` of ``to`` the forward process is ``x' =
        (a'/a) x + sqrt(s'^2 - (a'/a)^2 s^2) z``, z from the seeds. Scheduler history and technique
        states begin anew.
        Raises: ValueError for a later ``to``; ``UnsupportedModel`` for solvers of two evaluations.
        """
        return noised(self, state, to, seeds)

    def preview(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1], or videos, of the prediction ``state.x0``; it needs a
        step."""
        if state.x0 is None:
            raise ValueError("preview needs a state with a prediction; run one step first.")
        self.meter.charge(decodes=len(state.rng))
        generators = [generator_of(rng) for rng in state.rng]
        return self.segments.decode(state.x0.to(state.latents.dtype), generators, self.tiny)

    def decode(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1], or videos, of a finished state.

        The pipeline is called with no steps left, so it does nothing but decode.
        Raises: ValueError for a state that is not finished.
        """
        if not state.finished:
            raise ValueError(
                f"decode needs a finished state; got step {state.step} of {state.count}. Use "
                "preview(state) for its prediction."
            )
        self.meter.charge(decodes=len(state.rng))
        return self.segments.decode(state.latents, [generator_of(rng) for rng in state.rng])

    def render(
        self,
        noise: Tensor,
        grad: bool = True,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
        seeds: Sequence[int] | None = None,
        exact: int = 1,
    ) -> Tensor:
        """The images [B, 3, H, W] of start noise, differentiable; see ``gradient.render``.

        ``seeds``: of later noise, one per image; None for 0, 1, 2, ...
        """
        rendering = gradient.Rendering(grad, mode, clamp, exact)
        seeds = range(len(noise)) if seeds is None else seeds
        return gradient.render(self, noise, rendering, seeds)

    def twist(self, state: State, reward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``reward`` [B] of the predicted images, and its gradient; see ``gradient.twist``."""
        return gradient.twist(self, state, reward)
