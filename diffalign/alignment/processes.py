"""Several processes that search together, as ``accelerate launch`` or ``torchrun`` starts them.

Each draws its own seeds and has its share of the budget; the best of all is everybody's result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from diffalign.core import Budget

COUNTED = ("nfe", "rewards", "decodes", "backward")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that work on the same run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The processes of RANK and WORLD_SIZE, joined; one process without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def share(self, budget: Budget) -> Budget:
        """This process's part: counts are divided, seconds are everybody's.

        Raises: ValueError where a count is smaller than the number of processes.
        """
        if self.size == 1:
            return budget
        limits: dict[str, Any] = {}
        for name in COUNTED:
            limit = getattr(budget, name)
            if limit is not None and limit < self.size:
                raise ValueError(
                    f"Budget({name}={limit}) is too small for {self.size} processes; give at least "
                    f"{self.size}, or start fewer."
                )
            limits[name] = None if limit is None else limit // self.size
        return replace(budget, **limits)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        values: list[Any] = gather_object([value])
        return values
