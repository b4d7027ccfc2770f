"""Draft, then commit: a search runs on cheap images, and only its best ones are run in full."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from diffalign.core.errors import BudgetExceeded
from diffalign.core.option import option
from diffalign.core.registry import METHODS, TECHNIQUES, written
from diffalign.core.sampler import Clamp, Mode, State
from diffalign.core.search import (
    Ascent,
    ByChunks,
    Candidate,
    Info,
    Least,
    Lineage,
    Marks,
    Method,
    Problem,
    Stage,
    Tree,
)
from diffalign.core.technique import Technique
from diffalign.core.words import Shift
from diffalign.search.video.sampler import ChunkSampler


@dataclass(frozen=True, slots=True)
class Drafts:
    """Where the two phases stand."""

    # state of the inner method, None before its first step
    inner: Any = None
    # the best drafts so far, best first
    best: tuple[Candidate, ...] = ()
    # whether drafts are over, and how many of them were run in full
    drafted: bool = False
    full: int = 0


class DraftProblem:
    """The problem as the inner method sees it: cheap images, the full ones' share kept back."""

    def __init__(self, cheap: Problem, problem: Problem, full: int) -> None:
        self.cheap, self.problem, self.full = cheap, problem, full
        self.sampler, self.prompt, self.reward = cheap.sampler, problem.prompt, problem.reward
        self.meter, self.rng = problem.meter, problem.rng
        self.processes = problem.processes
        # every draft that was finished
        self.drafts: list[Candidate] = []

    @property
    def best(self) -> Candidate | None:
        """The best draft."""
        return max(self.drafts, key=lambda draft: draft.score, default=None)

    def seeds(self, count: int) -> list[int]:
        """As of the run."""
        return self.cheap.seeds(count)

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        """As of the run, after the images that will be run in full."""
        price = max(self.sampler.price(first, last), 1)
        rows = math.ceil(self.full * self.problem.sampler.price() / price)
        fits = self.cheap.room(count + rows, first, last, 0) - rows
        if scores:
            fits = min(fits, self.cheap.room(count + self.full, first, first, scores) - self.full)
        if fits < 1:
            raise BudgetExceeded("What is left of the budget is for the images run in full.")
        return fits

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """Drafts before the first step."""
        return self.cheap.start(seeds, noise)

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue drafts."""
        return self.cheap.run(state, until, drift)

    def twist(self, state: State) -> tuple[Tensor, Tensor]:
        """Scores of what drafts will be, and their gradient."""
        return self.cheap.twist(state)

    def decode(self, state: State) -> Tensor:
        """Images of drafts."""
        return self.cheap.decode(state)

    def preview(self, state: State) -> Tensor:
        """Scores of what the drafts will be."""
        return self.cheap.preview(state)

    def look(self, state: State, evaluations: int) -> State:
        """Drafts, looked ahead."""
        return self.cheap.look(state, evaluations)

    def marks(self, state: State, prompt: str, stage: Stage | None = None) -> Marks:
        """Scores of drafts as far as they are."""
        return self.cheap.marks(state, prompt, stage)

    def finish(
        self, state: State, lineages: Sequence[Lineage], *, parts: bool = False
    ) -> list[Candidate]:
        """Decode and score drafts; they are remembered here only."""
        drafts = self.cheap.finish(state, lineages, parts=parts)
        self.drafts += drafts
        return drafts

    def score(self, images: Tensor) -> Tensor:
        """Scores of images."""
        return self.cheap.score(images)

    def ascend(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        *,
        parts: bool = False,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> Ascent:
        """Scores of drafts and their gradients; the drafts are remembered here only."""
        ascent = self.cheap.ascend(noise, seeds, parts=parts, mode=mode, clamp=clamp)
        self.drafts += ascent.candidates
        return ascent

    def lean(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        shift: Shift,
        *,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> tuple[Tensor, Tensor]:
        """Scores of drafts and their gradient in the text."""
        return self.cheap.lean(noise, seeds, shift, mode=mode, clamp=clamp)

    def variant(
        self,
        techniques: Sequence[Technique] | None = None,
        call: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        cache: float | None = None,
        shift: Shift | None = None,
    ) -> DraftProblem:
        """Drafts of another kind."""
        cheap = self.cheap.variant(techniques, call, prompt, cache, shift)
        return DraftProblem(cheap, self.problem, self.full)


@dataclass(frozen=True)
class DraftCommit(Method[Drafts]):
    """Search with cheap images, then run the best ones in full from the same start noise.

    ``inner`` is any method whose images follow from their seed or start noise, an object or its
    text. A draft has fewer ``steps``, other ``techniques`` such as ``adaptive-guidance``, or the
    feature cache of diffusers on (``cache``: FirstBlockCache, where the denoiser has it); with
    none of these, half of the evaluations. The score of a draft only chooses; the result is an
    image run in full, alone, equal to a plain call with its seed.

    Paper: CachedSearch 2026, arXiv:2607.23159: drafts by a cache keep 94.7% of the gain of
    best-of-8 at 63% of its cost on Wan2.1-1.3B, drafts of half the steps 72.6% (the paper's
    figures).
    Cost: that of ``inner`` at the price of drafts, and ``commits`` trajectories. A cached step
    counts as a whole one in NFE: a cache saves seconds, not NFE.
    A video that is made chunk after chunk is a draft with fewer steps in each chunk; a tree of
    frames may search among such, since its choices lie between chunks.
    Refuses: methods that branch inside a trajectory; fewer steps with a sampler that draws noise
    while it runs, whose full image is another one than the draft.
    """

    inner: str | Method[Any] = option("best-of-n", "method that searches among drafts")
    steps: int | None = option(
        None, "steps of a draft, none for the run's, or half with no other saving", low=1
    )
    techniques: tuple[str | Technique, ...] = option(
        (), "techniques of a draft in place of the run's, none for the same"
    )
    cache: float | None = option(
        None, "threshold of the first-block cache for drafts, none for no cache", low=0.0
    )
    commits: int = option(2, "drafts that are run in full", low=1)

    def __post_init__(self) -> None:
        if isinstance(self.inner, Method):
            object.__setattr__(self, "inner", written(METHODS, self.inner))
        if isinstance(self.techniques, Sequence) and not isinstance(self.techniques, str):
            texts = (t if isinstance(t, str) else written(TECHNIQUES, t) for t in self.techniques)
            object.__setattr__(self, "techniques", tuple(texts))
        super().__post_init__()

    def check(self) -> None:
        if not self.method.seed_level and self.method.chunks == "never":
            raise ValueError(
                f"DraftCommit(inner={self.inner!r}) must be a method whose images follow from "
                "their start noise alone, such as best-of-n or zero-order; this one makes choices "
                "inside a trajectory, which a full run would not repeat."
            )
        _ = self.cheaper

    @cached_property
    def method(self) -> Method[Any]:
        """The inner method."""
        (method,) = METHODS.make(str(self.inner).strip("\"'"))
        return method

    @cached_property
    def cheaper(self) -> tuple[Technique, ...] | None:
        """The techniques of a draft, None for those of the run."""
        texts = [str(text).strip("\"'") for text in self.techniques]
        return tuple(t for text in texts for t in TECHNIQUES.make(text)) or None

    @property
    def ends(self) -> bool:
        return self.method.ends

    @property
    def chunks(self) -> ByChunks:
        return self.method.chunks

    def drafts(self, problem: Problem) -> DraftProblem:
        """The problem of the drafts."""
        count, steps = _steps(problem), self.steps
        if steps is None and self.cheaper is None and self.cache is None:
            steps = max(count // 2, 1)
            if _steps(problem.variant(call={"num_inference_steps": steps})) >= count:
                steps = max(steps // 2, 1)  # two evaluations a step
        call = None if steps is None else {"num_inference_steps": steps}
        cheap = problem.variant(self.cheaper, call, cache=self.cache)
        return DraftProblem(cheap, problem, self.commits)

    def refuses(self, problem: Problem) -> str | None:
        gradient = getattr(problem.reward, "differentiable", False)
        if self.method.needs_gradient and not gradient:
            return f"inner={self.inner!r} needs a reward with gradient, and this one has none."
        drafts = self.drafts(problem)
        if drafts.sampler.count != problem.sampler.count and problem.sampler.branches:
            return (
                "the sampler draws noise at every step, so an image with fewer steps says nothing "
                "about the full one. Use a deterministic sampler, or drafts by techniques or cache."
            )
        if drafts.sampler.price() > problem.sampler.price():
            return f"a draft takes {drafts.sampler.price()} NFE, more than a full image."
        return self.method.refuses(drafts)

    def least(self, problem: Problem) -> Least:
        full = Least(self.commits * problem.sampler.price(), self.commits, self.commits)
        return self.method.least(self.drafts(problem)) + full

    def init(self, problem: Problem) -> Drafts:
        return Drafts()

    def step(self, problem: Problem, state: Drafts) -> tuple[Drafts, Info]:
        if state.drafted:
            return self._commit(problem, state)
        drafts = self.drafts(problem)
        inner = self.method.init(drafts) if state.inner is None else state.inner
        over, info = False, Info("drafts")
        try:
            inner, info = self.method.step(drafts, inner)
        except BudgetExceeded:
            if not state.best and not drafts.drafts:
                raise
            over = True
        best = sorted((*state.best, *drafts.drafts), key=lambda draft: -draft.score)
        over = over or self.method.finished(inner)
        later = Drafts(inner, tuple(best[: self.commits]), over, state.full)
        return later, replace(info, text=f"draft: {info.text}")

    def _commit(self, problem: Problem, state: Drafts) -> tuple[Drafts, Info]:
        """Run the next best draft in full, alone."""
        problem.room(1)
        draft = state.best[state.full]
        lineage = draft.lineage
        noise = None if lineage.noise is None else lineage.noise[None]
        images = problem.start([lineage.moves[0].seed], noise)
        for move in lineage.moves[1:]:
            images = problem.run(images, move.step) if move.step > images.step else images
            images = images.reseed([move.seed])
        (candidate,) = problem.finish(problem.run(images), [lineage])
        values = {"draft": draft.score, "score": candidate.score}
        return replace(state, full=state.full + 1), Info("in full", values)

    def finished(self, state: Drafts) -> bool:
        return state.drafted and state.full >= len(state.best)

    def tree(self, state: Drafts) -> Tree | None:
        return None if state.inner is None else self.method.tree(state.inner)

    def best(self, problem: Problem, state: Drafts) -> Candidate | None:
        """The best full image; before the first one the best draft."""
        return problem.best or (state.best[0] if state.best else None)


def _steps(problem: Problem) -> int:
    """Evaluations of an image, or of each chunk of a video."""
    sampler = problem.sampler
    return sampler.expander.count if isinstance(sampler, ChunkSampler) else sampler.count
