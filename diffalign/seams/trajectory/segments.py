"""Calls of the pipeline that show it a part of the schedule: what lies beneath a sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from diffalign.core import SessionError
from diffalign.core.identity import remembered
from diffalign.core.types import Keywords, Pipeline
from diffalign.core.words import Shift
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.call import Call
from diffalign.seams.trajectory.device import known
from diffalign.seams.trajectory.grid import Grid, grid_of
from diffalign.seams.trajectory.schedule import Window, segment
from diffalign.seams.trajectory.texts import Texts
from diffalign.seams.words import check_shift, shifted


class Segments:
    """Segments of one pipeline and call: noise levels, start noise, decoded images."""

    def __init__(self, pipe: Pipeline, options: Keywords, shift: Shift | None = None) -> None:
        self.pipe, self.call, self.shift = pipe, Call(pipe, options), shift
        self.texts = Texts()
        self._hashes: dict[int, str] = {}
        if shift is not None:
            check_shift(pipe, self.call.bound.values.get("prompt"), shift)
        self._grid: Grid | None = None
        self._noise: Tensor | None = None
        # device of the denoiser's weights -> where the pipeline runs
        self._devices: dict[torch.device, torch.device] = {}

    @property
    def grid(self) -> Grid:
        """The noise levels of a trajectory."""
        if self._grid is None:
            self.draw(range(self.call.least))
        assert self._grid is not None
        return self._grid

    @property
    def noise(self) -> Tensor:
        """Start noise of the pipeline's own shape, dtype and device, [1, ...]."""
        if self._noise is None:
            self.draw(range(self.call.least))
        assert self._noise is not None
        return self._noise

    @contextmanager
    def within(self, window: Window) -> Iterator[None]:
        """The pipeline shows that part of the schedule, encodes no text and hashes no model twice.

        Raises: ``SessionError`` where the pipeline's scheduler is of another class by now.
        """
        scheduler = self.pipe.scheduler
        name = original_class(scheduler).__name__
        if self._grid is not None and name != self._grid.scheduler:
            raise SessionError(
                f"The pipeline's scheduler was {self._grid.scheduler} and is {name} now; make a "
                "new sampler."
            )
        with ExitStack() as stack:
            stack.enter_context(known(self.pipe, self._device))
            stack.enter_context(remembered(self._hashes))
            if self.shift is None or not self.shift.values.requires_grad:
                stack.enter_context(self.texts.remembered(self.pipe))
            if self.shift is not None:
                stack.enter_context(shifted(self.pipe, self.shift))
            stack.enter_context(segment(scheduler, window))
            yield

    @property
    def _device(self) -> torch.device:
        """Where the pipeline runs; asked again when the weights have moved."""
        denoiser = next(iter(self.call.family.present(self.pipe).values()))
        place = next(denoiser.parameters()).device
        if place not in self._devices:
            self._devices = {place: self.pipe._execution_device}
        return self._devices[place]

    def draw(self, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
        """The pipeline's own start noise [B, ...], and its generators afterwards.

        A segment without steps behind the first: the pipeline returns what it starts from.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        window = Window(1, 1)
        with self.within(window), torch.no_grad():
            noise = self.call(None, generators, "latent", self.call.plain)
            if self._grid is None:
                self._noise = noise[:1].clone()
                window.depth = 1  # the scheduler shows all that it has
                self._grid = grid_of(
                    self.call.family,
                    self.pipe.scheduler,
                    self._noise,
                    dict(self.call.bound.values),
                    window.multiplied,
                )
        return noise, generators

    def decode(
        self, latents: Tensor, generators: Sequence[torch.Generator], decoder: Pipeline = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of clean latents [B, ...].

        ``decoder``: stands in for the pipeline's own, None for that one.
        """
        count = self.grid.count
        with self.within(Window(count, count)), _decoder(self.pipe, decoder):
            return self.call(latents, generators, "pt", self.call.plain)


@contextmanager
def _decoder(pipe: Pipeline, decoder: Pipeline) -> Iterator[None]:
    if decoder is None:
        yield
        return
    before = pipe.__dict__["vae"]
    pipe.__dict__["vae"] = decoder
    try:
        yield
    finally:
        pipe.__dict__["vae"] = before
