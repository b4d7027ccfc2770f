"""Training of networks under one optimiser whose averaged weights are what ships."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from diffalign.embedded.workshop.training import FlatAdam, State, cosine, saved_state


class AveragedTrainer(ABC):
    """The state of a run. ``options`` needs updates, decay_from (update at which the rate begins to
    fall), rate and decay (of the average, per update)."""

    # updates of the warm-up, and those between two updates of the average
    warm: ClassVar[int] = 300
    every: ClassVar[int] = 4

    def __init__(self, options: argparse.Namespace, flat: FlatAdam) -> None:
        self.options, self.flat = options, flat
        self.ema = flat.master.data.clone()
        self.done = 0

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One update; what the log shall say of it."""

    def update(self) -> float:
        """Move the weights along their gradients, and the average; returns the gradient's norm."""
        norm = self.flat.step(self.rate())
        self.done += 1
        if self.done % self.every == 0:
            self.meet()
            decay = min(self.options.decay, (1 + self.done) / (10 + self.done)) ** self.every
            self.ema.lerp_(self.flat.master.data, 1 - decay)
        return norm

    def meet(self) -> None:  # noqa: B027
        """What precedes an update of the average; nothing by default."""

    def rate(self) -> float:
        """Learning rate of the next update."""
        options = self.options
        hold = options.decay_from / options.updates
        return cosine(self.done, options.updates, options.rate, warm=self.warm, hold=hold)

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {"flat": self.flat.state(), "ema": self.ema, "done": self.done}

    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        self.flat.load(state["flat"])
        self.ema.copy_(state["ema"])
        self.done = int(state["done"])


def weights(state: Path, *, averaged: bool = True) -> Tensor:
    """The flat weights in the state of such a run; ``averaged`` chooses their average.

    Raises: ValueError where there is no state.
    """
    trainer = saved_state(state)["trainer"]
    vector: Tensor = trainer["ema"] if averaged else trainer["flat"]["master"]
    return vector
