"""A trajectory in segments: everything that it is between two steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from diffalign.core.rows import Rows, join_rows, select_rows

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.core.words import Words

Mode = Literal["one_step", "checkpoint", "skip", "residual", "plain"]
"""How ``Sampler.render`` keeps what the backward pass needs."""
Clamp = Literal["hard", "straight_through"]
"""What a saturated pixel does to a gradient: it is zero there, or passes unchanged."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The Gaussian from which the last step drew the latents: ``N(mean + drift, std^2)``."""

    # [B, ...] of the kernel alone
    mean: Tensor
    # standard deviation of each value; 0 where the step is deterministic
    std: float
    # [B, ...] what the caller added to the mean, None for nothing
    drift: Tensor | None = None

    def select(self, rows: Sequence[int]) -> Transition:
        """The transition of those images."""
        drift = None if self.drift is None else self.drift[list(rows)]
        return Transition(self.mean[list(rows)], self.std, drift)

    def log_p(self, latents: Tensor) -> Tensor:
        """Log density [B], float64, of the kernel at ``latents`` [B, ...], over all values.

        Raises: ValueError for a deterministic step, which has no density.
        """
        return self._log(latents, self.mean)

    def log_q(self, latents: Tensor) -> Tensor:
        """Log density [B], float64, of what was drawn from: the kernel with the drift."""
        return self._log(latents, self.mean if self.drift is None else self.mean + self.drift)

    def _log(self, latents: Tensor, mean: Tensor) -> Tensor:
        if not self.std > 0:
            raise ValueError(
                "A step with standard deviation 0 has no density; weigh only steps that draw noise."
            )
        z = (latents.double() - mean.double()).flatten(1) / self.std
        constant = z.shape[1] * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return -0.5 * z.square().sum(1) - constant


@dataclass(frozen=True, slots=True)
class State:
    """A batch of images between two evaluations of the model; it may be kept, copied and resumed.

    Nothing in it changes while it is run: the same state run twice gives the same images.
    """

    # [B, ...] as the pipeline takes them as ``latents=``
    latents: Tensor
    # evaluations made, in [0, count]
    step: int
    # evaluations of the whole trajectory
    count: int
    # per image, the state of its random generator
    rng: tuple[Tensor, ...]
    # history of the scheduler, of a video its chunks; None before the first step
    scheduler: Rows | None = None
    # technique -> its state, None for one that remembers nothing
    techniques: Mapping[str, Rows | None] | None = None
    # [B, ...] clean latents as the last evaluation predicts them, in the layout of ``latents``;
    # None before the first
    x0: Tensor | None = None
    # how the last step drew ``latents``; None where the kernel does not say
    transition: Transition | None = None
    # whether the generators are new since the last step: images of one state must then differ
    reseeded: bool = False

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.count

    def select(self, rows: Sequence[int]) -> State:
        """The state of those images, in that order; an image may appear more than once."""
        techniques = self.techniques or {}
        return replace(
            self,
            latents=self.latents[list(rows)],
            rng=tuple(self.rng[row] for row in rows),
            scheduler=select_rows(self.scheduler, rows),
            techniques={name: select_rows(state, rows) for name, state in techniques.items()},
            x0=None if self.x0 is None else self.x0[list(rows)],
            transition=select_rows(self.transition, rows),
        )

    def reseed(self, seeds: Sequence[int]) -> State:
        """The same images with fresh random generators, one seed each: children that differ.

        Raises: ValueError where the number of seeds is not that of the images.
        """
        if len(seeds) != len(self.rng):
            raise ValueError(
                f"reseed(seeds=...) needs one seed for each of {len(self.rng)} images; got "
                f"{len(seeds)}."
            )
        return replace(self, rng=generator_states(seeds), reseeded=True)


def generator_states(seeds: Sequence[int]) -> tuple[Tensor, ...]:
    """The state of a fresh generator for each seed; they are the CPU's, as seeds are everywhere."""
    import torch

    return tuple(torch.Generator().manual_seed(seed).get_state() for seed in seeds)


def join(states: Sequence[State]) -> State:
    """One batch of the images of several states at the same evaluation, in order.

    Scheduler history and technique states are put together too.
    Raises: ValueError where there is no state, or the states cannot be joined.
    """
    if not states:
        raise ValueError("join(states=...) needs at least one state; got none.")
    first = states[0]
    if len(states) == 1:
        return first
    places = sorted({(state.step, state.count) for state in states})
    if len(places) > 1:
        raise ValueError(
            "join(states=...) needs states at the same evaluation; got "
            + ", ".join(f"{step} of {count}" for step, count in places)
            + ". Run them to one evaluation first."
        )
    import torch

    shapes = sorted({tuple(state.latents.shape[1:]) for state in states})
    if len(shapes) > 1:
        raise ValueError(f"join(states=...) needs latents of one shape; got {shapes}.")
    sizes = [len(state.rng) for state in states]
    names = [set(state.techniques or {}) for state in states]
    if any(other != names[0] for other in names):
        raise ValueError("join(states=...) needs states of the same techniques.")
    predictions = [state.x0 for state in states if state.x0 is not None]
    transitions = [state.transition for state in states]
    return State(
        latents=torch.cat([state.latents for state in states]),
        step=first.step,
        count=first.count,
        rng=tuple(rng for state in states for rng in state.rng),
        scheduler=join_rows([state.scheduler for state in states], sizes),
        techniques={
            name: join_rows([(state.techniques or {})[name] for state in states], sizes)
            for name in names[0]
        },
        x0=torch.cat(predictions) if len(predictions) == len(states) else None,
        transition=_join_transitions(transitions),
        reseeded=any(state.reseeded for state in states),
    )


def _join_transitions(transitions: Sequence[Transition | None]) -> Transition | None:
    """None unless every state has one, with the same standard deviation."""
    import torch

    known = [transition for transition in transitions if transition is not None]
    if len(known) < len(transitions) or len({transition.std for transition in known}) > 1:
        return None
    mean = torch.cat([transition.mean for transition in known])
    if all(transition.drift is None for transition in known):
        return Transition(mean, known[0].std)
    drifts = [torch.zeros_like(t.mean) if t.drift is None else t.drift for t in known]
    return Transition(mean, known[0].std, torch.cat(drifts))


class Sampler(Protocol):
    """Runs trajectories of one pipeline and prompt, whole or in segments, techniques active."""

    @property
    def count(self) -> int:
        """Evaluations of one whole trajectory, known before anything has run."""
        ...

    @property
    def branches(self) -> bool:
        """Whether two children of one state can differ: the kernel draws noise."""
        ...

    @property
    def deterministic(self) -> str | None:
        """Why children of one state are alike and which kernel would do, None where they differ."""
        ...

    @property
    def words(self) -> Words:
        """The vocabulary of the pipeline's first text encoder.

        Raises: ``UnsupportedModel`` where there is none that pools its text.
        """
        ...

    def price(self, first: int = 0, last: int | None = None) -> int:
        """Largest number of denoiser rows of one image between two evaluations, None for the end.

        It is known before any compute.
        """
        ...

    def std(self, step: int) -> float:
        """Standard deviation of the noise that the kernel adds at an evaluation, 0 for none.

        Raises: ``UnsupportedModel`` for a kernel that does not say.
        """
        ...

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The start noise [B, ...] that the seeds draw: with it ``start`` makes the same states.

        Raises: ``UnsupportedModel`` for a pipeline that cannot be given it.
        """
        ...

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """The state before the first step, one image per seed.

        ``noise`` [B, ...] as the pipeline takes it; None: what the pipeline itself draws from
        ``torch.Generator().manual_seed(seed)``.
        """
        ...

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue to evaluation ``until``, None for the end. ``state`` is not changed.

        ``drift`` [B, ...] is added to the mean of the first step.
        """
        ...

    def redraw(self, state: State, seeds: Sequence[int]) -> State:
        """Other outcomes of the step that made ``state``, one seed each, without an evaluation.

        They are those of ``reseed(seeds)`` before that step.
        Raises: ValueError where the state does not say how it was drawn, or nothing was drawn.
        """
        ...

    def renoise(self, state: State, to: int, seeds: Sequence[int]) -> State:
        """The images noised again, by the forward process, to the earlier evaluation ``to``."""
        ...

    def preview(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of the prediction ``state.x0``."""
        ...

    def decode(self, state: State) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of a finished state."""
        ...

    def render(
        self,
        noise: Tensor,
        grad: bool = True,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """The images [B, 3, H, W] of start noise, differentiable with respect to ``noise``."""
        ...

    def twist(self, state: State, reward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``reward`` [B] of the predicted images, and its gradient in ``state.latents``."""
        ...
