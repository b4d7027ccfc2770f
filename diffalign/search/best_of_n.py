"""Best of N: N plain images, the best one is the result."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffalign.core.option import option
from diffalign.core.search import ByChunks, Info, Lineage, Method, Move, Problem


@dataclass(frozen=True, slots=True)
class Draws:
    """How many images are drawn, of how many that this process is to draw (None: no end)."""

    count: int = 0
    target: int | None = None


@dataclass(frozen=True)
class BestOfN(Method[Draws]):
    """Draw images from fresh noise and keep the best: random search, the baseline of every other.

    The N images are those of ``diffalign generate --count N``. The gain grows about as the square
    root of log N: each doubling adds less.

    Paper: Ma et al. 2025, arXiv:2501.09732, section 3 (random search).
    Cost: N trajectories, N decoded and scored images.
    """

    n: int | None = option(None, "images to draw, none for as many as the budget allows", low=1)
    batch: int = option(4, "images in one round", low=1)

    seed_level = True

    @property
    def chunks(self) -> ByChunks:
        return "can"

    @property
    def ends(self) -> bool:
        return self.n is not None

    @property
    def total(self) -> int | None:
        return self.n

    def init(self, problem: Problem) -> Draws:
        return Draws(0, None if self.n is None else -(-self.n // problem.processes))

    def step(self, problem: Problem, state: Draws) -> tuple[Draws, Info]:
        target = state.target
        left = self.batch if target is None else min(self.batch, target - state.count)
        count = problem.room(left)
        seeds = problem.seeds(count)
        images = problem.run(problem.start(seeds))
        scores = [
            candidate.score
            for candidate in problem.finish(images, [Lineage((Move(0, seed),)) for seed in seeds])
        ]
        total = state.count + count
        return replace(state, count=total), Info(f"{total} images", {"mean": sum(scores) / count})

    def finished(self, state: Draws) -> bool:
        return state.target is not None and state.count >= state.target
