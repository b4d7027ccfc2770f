"""Random search: as many start noises as an optimiser would render."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.core.option import option
from diffalign.core.search import ByChunks, Info, Lineage, Method, Move, Problem


@dataclass(frozen=True)
class RandomSearch(Method[int]):
    """Draw start noises, render each once, keep the best: what every optimiser has to beat.

    With 50 noises it renders as many images as ReNO does. The images are those of ``BestOfN``; the
    state is how many are left.

    Paper: Ma et al. 2025, arXiv:2501.09732, section 3 (random search).
    Cost: noises trajectories, as many decoded and scored images; no gradient.
    """

    noises: int = option(50, "start noises", low=1)
    batch: int = option(4, "noises of one step", low=1)

    seed_level = True

    @property
    def ends(self) -> bool:
        return True

    @property
    def chunks(self) -> ByChunks:
        return "can"

    @property
    def total(self) -> int | None:
        return self.noises

    def init(self, problem: Problem) -> int:
        """Several processes share the noises: each counts what is left of its share."""
        return -(-self.noises // problem.processes)

    def step(self, problem: Problem, state: int) -> tuple[int, Info]:
        seeds = problem.seeds(problem.room(min(self.batch, state)))
        lineages = [Lineage((Move(0, seed),)) for seed in seeds]
        candidates = problem.finish(problem.run(problem.start(seeds)), lineages)
        mean = sum(candidate.score for candidate in candidates) / len(candidates)
        rest = state - len(seeds)
        return rest, Info(f"{rest} noises left", {"mean": mean})

    def finished(self, state: int) -> bool:
        return state == 0
