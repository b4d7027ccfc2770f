"""Trajectories of one pipeline, whole or in segments, through the pipeline's own ``__call__``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.core import Meter, State, UnsupportedModel
from diffalign.seams.denoiser.tap import Start
from diffalign.seams.plan import bind
from diffalign.seams.session import Session
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.schedule import Window, segment

# arguments that follow the position in the loop, which a segment counts from 0
LOOP_KEYED: Mapping[str, tuple[Any, str]] = {
    "control_guidance_start": (0.0, "a ControlNet's window"),
    "control_guidance_end": (1.0, "a ControlNet's window"),
    "skip_guidance_layers": (None, "skip-layer guidance of the pipeline; use da.SkipLayerGuidance"),
    "callback_on_step_end": (None, "a callback with step numbers"),
}


class PipelineSampler:
    """A ``Sampler`` over an unmodified pipeline; use it in a ``with`` block.

    ``call``: arguments of the pipeline, prompts included; ``latents``, ``generator`` and
    ``output_type`` are the sampler's. Techniques stay active in every segment, and their states
    travel with ``State``.
    Raises: ``UnsupportedModel`` where the pipeline takes no start latents, and for arguments that
    follow the position in the loop.
    """

    def __init__(
        self, pipe: Any, techniques: Sequence[Any] = (), meter: Meter | None = None, **call: Any
    ) -> None:
        cls = original_class(pipe)
        values = bind(cls, pipe, (), call).values
        if "latents" not in values or "image" in values or "video" in values:
            raise UnsupportedModel(
                f"{cls.__name__} does not start from latents=, so its trajectories cannot be cut."
            )
        for name, (neutral, what) in LOOP_KEYED.items():
            if values.get(name, neutral) not in (neutral, [neutral]):
                raise UnsupportedModel(
                    f"{name}={values[name]!r} is {what}: it follows the position in the loop, and "
                    "a segment counts from 0. Leave it out."
                )
        for name in ("latents", "generator", "output_type"):
            if call.get(name) is not None:
                raise ValueError(
                    f"PipelineSampler({name}=...) is set by the sampler; leave it out."
                )
        self.pipe, self.call = pipe, call
        self.session = Session(pipe, techniques, meter)

    def __enter__(self) -> Self:
        self.session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.session.close()

    def start(self, noise: Tensor, seeds: Sequence[int]) -> State:
        """The state before the first step. ``noise`` [B, ...] as the pipeline takes it."""
        if len(seeds) != len(noise):
            raise ValueError(f"start(seeds=...) needs {len(noise)} seeds; got {len(seeds)}.")
        device = noise.device.type
        rng = tuple(torch.Generator(device).manual_seed(seed).get_state() for seed in seeds)
        return State(noise, 0, 0, rng)

    def run(self, state: State, until: int | None = None) -> State:
        """Continue to evaluation ``until``, None for the end.

        Cost: the evaluations between; the texts are encoded again.
        Raises: ValueError for an ``until`` that is not ahead.
        """
        if until is not None and until <= state.step:
            raise ValueError(f"run(until={until}) must be above the state's step {state.step}.")
        window = Window(state.step, until, state.scheduler)  # type: ignore[arg-type]
        generators = [_generator(state.latents, rng) for rng in state.rng]
        self.session.start = Start(state.step, state.count or None, dict(state.techniques or {}))
        try:
            with segment(self.pipe.scheduler, window):
                latents = self._call(state.latents, generators, "latent")
                snapshot = window.snapshot(self.pipe.scheduler, len(latents))
        finally:
            self.session.start = None
        step = window.count if until is None else min(until, window.count)
        rng = tuple(generator.get_state() for generator in generators)
        return State(latents, step, window.count, rng, snapshot, self.session.states)

    def decode(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1], or videos, of a finished state.

        The pipeline is called with no steps left, so it does nothing but decode.
        Raises: ValueError for a state that is not finished.
        """
        if not state.count or not state.finished:
            raise ValueError(
                f"decode needs a finished state; got step {state.step} of {state.count}."
            )
        generators = [_generator(state.latents, rng) for rng in state.rng]
        with segment(self.pipe.scheduler, Window(state.count, state.count)):
            return self._call(state.latents, generators, "pt")

    def _call(self, latents: Tensor, generators: list[torch.Generator], output: str) -> Tensor:
        generator = generators if len(generators) > 1 else generators[0]
        arguments = {"latents": latents, "generator": generator, "output_type": output}
        result = self.pipe(**self.call, **arguments, return_dict=False)[0]
        if not isinstance(result, Tensor):
            raise UnsupportedModel(
                f"{original_class(self.pipe).__name__} returned {type(result).__name__} instead of "
                "latents for output_type='latent'."
            )
        return result


def _generator(latents: Tensor, state: Tensor) -> torch.Generator:
    generator = torch.Generator(latents.device.type)
    generator.set_state(state)
    return generator
