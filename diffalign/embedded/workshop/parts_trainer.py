"""Training of parts that do not touch each other, each with its own optimiser and average."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    FlatAdam,
    State,
    cosine,
    saved_state,
    train,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin


class PartsTrainer(ABC):
    """The state of a run. ``options`` needs ``updates`` and ``rate``; ``hold``: share of the run at
    the full rate; ``longest``: the decay of the averages in the end."""

    def __init__(
        self,
        options: argparse.Namespace,
        parts: Mapping[str, FlatAdam],
        hold: float,
        longest: float,
    ) -> None:
        self.options, self.parts, self.hold, self.longest = options, parts, hold, longest
        self.ema: dict[str, Tensor] = {
            name: flat.master.data.clone() for name, flat in parts.items()
        }
        self.done = 0

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One update; what the log shall say of it."""

    @abstractmethod
    def export(self) -> ModelMixin:
        """The autoencoder with the averaged weights in fp32; ends the training of this object."""

    def update(self, name: str) -> None:
        """Move the weights of a part and their average."""
        flat = self.parts[name]
        flat.step(self.rate())
        decay = min(self.longest, (1 + self.done) / (10 + self.done))
        self.ema[name].lerp_(flat.master.data, 1 - decay)

    def rate(self) -> float:
        """Learning rate of the next update."""
        options = self.options
        return cosine(self.done, options.updates, options.rate, warm=100, hold=self.hold)

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {
            "parts": {name: flat.state() for name, flat in self.parts.items()},
            "ema": self.ema,
            "done": self.done,
        }

    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        for name, flat in self.parts.items():
            flat.load(state["parts"][name])
            self.ema[name].copy_(state["ema"][name])
        self.done = int(state["done"])

    def settle(self) -> None:
        """Give the parts their averaged weights; this ends the training."""
        for name, flat in self.parts.items():
            flat.write(self.ema[name])


def run(trainer: PartsTrainer, model: str, course: Course) -> None:
    """Train, or with ``options.export`` write the autoencoder of the saved state there."""
    options = trainer.options
    if options.export is not None:
        trainer.load(saved_state(options.out / STATE)["trainer"])
        trainer.export().save_pretrained(options.export)
        return
    header = {"model": model, **{k: str(v) for k, v in vars(options).items()}}
    train(trainer, options, header, course, facts=lambda: {"rate": round(trainer.rate(), 7)})
