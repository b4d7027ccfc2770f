"""One prompt, one pipeline and one reward, as a method sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.alignment.parts import decode_in_parts, run_in_parts, twist_in_parts
from diffalign.alignment.processes import World
from diffalign.alignment.scoring import Fit, Ranking, Scorer
from diffalign.core import BudgetExceeded, Meter, State, Technique
from diffalign.core.reward import Reward
from diffalign.core.search import Candidate, Lineage
from diffalign.core.seeds import seed_of
from diffalign.core.types import Pipeline
from diffalign.seams.trajectory.cached import CachedSampler
from diffalign.seams.trajectory.sampler import PipelineSampler


@dataclass(frozen=True, slots=True)
class Moment:
    """What had been spent when the best image changed."""

    nfe: int
    evaluations: int
    seconds: float
    score: float


@dataclass(slots=True)
class Progress:
    """What a run shares with its variants: counters, the best images, the sampler that is open."""

    meter: Meter
    ranking: Ranking
    scorer: Scorer
    fit: Fit
    rng: torch.Generator
    # seeds drawn
    seeds: int = 0
    history: list[Moment] = field(default_factory=list)
    world: World = field(default_factory=World)
    # rows of the final call
    reserve: int = 0
    # seconds in the sampler and denoiser rows there, to foresee what further rows take
    sampling: float = 0.0
    sampled: int = 0
    open: PipelineSampler | None = None
    # called with the newest best image
    improved: Callable[[Candidate], None] | None = None

    def use(self, sampler: PipelineSampler | None) -> None:
        """Open this sampler and close the one before."""
        if self.open is sampler:
            return
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = None
        if sampler is not None:
            sampler.__enter__()
            self.open = sampler


@dataclass(frozen=True, slots=True)
class Setting:
    """How the pipeline is called."""

    pipe: Pipeline
    prompt: str
    techniques: tuple[Technique, ...] = ()
    # further arguments of the pipeline
    call: Mapping[str, Any] = field(default_factory=dict)
    kernel: Any = None
    # threshold of the first-block cache, None for no cache
    cache: float | None = None

    def sampler(self, meter: Meter) -> PipelineSampler:
        """A sampler of this setting, not open yet."""
        call = {**self.call, "prompt": self.prompt}
        if self.cache is None:
            return PipelineSampler(self.pipe, self.techniques, meter, kernel=self.kernel, **call)
        return CachedSampler(
            self.pipe, self.techniques, meter, kernel=self.kernel, cache=self.cache, **call
        )


class PipelineProblem:
    """The ``Problem`` of a diffusers pipeline."""

    def __init__(
        self, setting: Setting, prompt: str, seed: int, progress: Progress, draft: bool = False
    ) -> None:
        self.setting, self.prompt, self.seed = setting, prompt, seed
        self.progress, self.draft = progress, draft
        self.sampler = setting.sampler(progress.meter)

    @property
    def reward(self) -> Reward:
        return self.progress.scorer.reward

    @property
    def meter(self) -> Meter:
        return self.progress.meter

    @property
    def rng(self) -> torch.Generator:
        return self.progress.rng

    @property
    def processes(self) -> int:
        return self.progress.world.size

    @property
    def best(self) -> Candidate | None:
        return self.progress.ranking.best

    def seeds(self, count: int) -> list[int]:
        first, world = self.progress.seeds, self.progress.world
        self.progress.seeds += count
        # those of other processes lie between
        indices = [index * world.size + world.rank for index in range(first, first + count)]
        return [seed_of(self.prompt, index, self.seed) for index in indices]

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        if count < 1:
            raise ValueError(f"room(count=...) must be at least 1; got {count}.")
        price, reserve = self.sampler.price(first, last), self.progress.reserve
        budget, meter = self.meter.budget, self.meter
        shares = [
            (budget.nfe, meter.rows + reserve, price),
            (budget.decodes, meter.decodes + 1, scores),
            (budget.rewards, meter.rewards + 1, scores),
        ]
        fits = [count]
        fits += [(limit - spent) // each for limit, spent, each in shares if limit and each]
        if budget.seconds is not None:
            fits.append(self._in_time(budget.seconds - meter.seconds, price, reserve))
        if min(fits) < 1:
            raise BudgetExceeded(
                f"The budget {_text(budget)} is used up: one more image takes {price} NFE, and "
                f"{reserve} are kept for the final call; {meter.rows} are spent."
            )
        return min(fits)

    def _in_time(self, left: float, price: int, reserve: int) -> int:
        """Images of ``price`` rows that fit into ``left`` seconds beside the final call."""
        if not self.progress.sampled:
            return int(left > 0)
        row = self.progress.sampling / self.progress.sampled
        return int(max(0.0, left - reserve * row) / max(price * row, 1e-9))

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        self.progress.use(self.sampler)
        return self.sampler.start(seeds, noise)

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        self.progress.use(self.sampler)
        before, start = self.meter.rows, perf_counter()
        result = run_in_parts(self.sampler, self.progress.fit, state, until, drift)
        self.progress.sampling += perf_counter() - start
        self.progress.sampled += self.meter.rows - before
        return result

    def twist(self, state: State) -> tuple[Tensor, Tensor]:
        self.progress.use(self.sampler)

        def reward(images: Tensor) -> Tensor:
            self.meter.charge(rewards=len(images))
            return self.reward(images, [self.prompt] * len(images))

        return twist_in_parts(self.sampler, self.progress.fit, state, reward)

    def decode(self, state: State) -> Tensor:
        self.progress.use(self.sampler)
        return decode_in_parts(self.sampler, self.progress.fit, state)

    def preview(self, state: State) -> Tensor:
        self.progress.use(self.sampler)
        rows = len(state.latents)
        images = self.progress.fit.parts(
            rows, lambda part: self.sampler.preview(state.select(part))
        )
        return torch.cat([self.score(batch) for batch in images])

    def finish(self, state: State, lineages: Sequence[Lineage]) -> list[Candidate]:
        self.progress.use(self.sampler)
        rows = len(state.latents)
        if len(lineages) != rows:
            raise ValueError(f"finish needs {rows} lineages, one per image; got {len(lineages)}.")
        parts = self.progress.fit.parts(rows, lambda part: self.sampler.decode(state.select(part)))
        candidates: list[Candidate] = []
        for images in parts:
            scores = self.score(images).tolist()
            pictures = images.detach().to("cpu", torch.float32)
            for score, picture in zip(scores, pictures, strict=True):
                lineage = self._own(lineages[len(candidates)])
                candidates.append(Candidate(score, picture.clone(), lineage))
                if not self.draft:
                    self._add(candidates[-1])
        return candidates

    def _own(self, lineage: Lineage) -> Lineage:
        """A lineage of a variant with its own text says which."""
        if lineage.prompt is None and self.setting.prompt != self.prompt:
            return replace(lineage, prompt=self.setting.prompt)
        return lineage

    def _add(self, candidate: Candidate) -> None:
        progress, meter = self.progress, self.meter
        if progress.ranking.add(candidate):
            moment = Moment(meter.rows, meter.evaluations, meter.seconds, candidate.score)
            progress.history.append(moment)
            if progress.improved is not None:
                progress.improved(candidate)

    def score(self, images: Tensor) -> Tensor:
        return self.progress.scorer(images)

    def variant(
        self,
        techniques: Sequence[Technique] | None = None,
        call: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        cache: float | None = None,
    ) -> Self:
        setting = replace(
            self.setting,
            techniques=self.setting.techniques if techniques is None else tuple(techniques),
            call={**self.setting.call, **(call or {})},
            prompt=prompt or self.setting.prompt,
            cache=self.setting.cache if cache is None else cache,
        )
        draft = self.draft or techniques is not None or bool(call) or cache is not None
        return type(self)(setting, self.prompt, self.seed, self.progress, draft)

    def repeat(self, lineage: Lineage) -> Tensor:
        """The image [1, 3, H, W] of a lineage, made alone from the beginning."""
        if lineage.prompt not in (None, self.setting.prompt):
            return self.variant(prompt=lineage.prompt).repeat(lineage)
        first, *others = lineage.moves
        noise = None if lineage.noise is None else lineage.noise[None]
        state = self.start([first.seed], noise)
        for move in others:
            if move.step > state.step:
                state = self.run(state, move.step)
            if move.back is not None:
                state = self.sampler.renoise(state, move.back, [move.seed])
            else:
                state = state.reseed([move.seed])
        if not state.finished or not state.count:
            state = self.run(state)
        return self.sampler.decode(state)


def _text(budget: object) -> str:
    limits = {
        name: getattr(budget, name)
        for name in ("nfe", "rewards", "seconds", "decodes", "backward")
        if getattr(budget, name) is not None
    }
    return ", ".join(f"{name}={limit:g}" for name, limit in limits.items()) or "without limits"
