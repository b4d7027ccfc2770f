"""One prompt, one pipeline and one reward, as a method sees them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.alignment.ascent import parts_of, slopes_of
from diffalign.alignment.marks import Marker, look_in_parts, marks_in_parts
from diffalign.alignment.parts import decode_in_parts, in_parts, run_in_parts, twist_in_parts
from diffalign.alignment.progress import Pace, Progress
from diffalign.alignment.scoring import BadScore, Fit, Ranking
from diffalign.alignment.setting import Setting, finished
from diffalign.core import Meter, State, Technique
from diffalign.core.reward import Reward
from diffalign.core.sampler import Clamp, Mode
from diffalign.core.search import Ascent, Candidate, Lineage, Marks, Move, Stage
from diffalign.core.seeds import seed_of
from diffalign.core.words import Shift


class PipelineProblem:
    """The ``Problem`` of a diffusers pipeline."""

    def __init__(
        self, setting: Setting, prompt: str, seed: int, progress: Progress, draft: bool = False
    ) -> None:
        self.setting, self.prompt, self.seed, self.draft = setting, prompt, seed, draft
        self.progress, self.sampler = progress, setting.sampler(progress.meter)
        self._variants: deque[PipelineProblem] = deque(maxlen=8)

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
        numbers = self.progress.numbers(count)
        return [seed_of(self.prompt, number, self.seed) for number in numbers]

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        if self.meter.budget.seconds is not None and not self.progress.sampling.units:
            _time(self)
        return self.progress.room(count, self.sampler.price(first, last), scores)

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        self.progress.use(self.sampler)
        return self.sampler.start(seeds, noise)

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        self.progress.use(self.sampler)
        with self.progress.timed():
            return run_in_parts(self.sampler, self.progress.fit, state, until, drift)

    def twist(self, state: State) -> tuple[Tensor, Tensor]:
        self.progress.use(self.sampler)

        def reward(images: Tensor) -> Tensor:
            self.meter.charge(rewards=len(images))
            return self.reward(images, [self.prompt] * len(images))

        with self.progress.timed():
            return twist_in_parts(self.sampler, self.progress.fit, state, reward)

    def decode(self, state: State) -> Tensor:
        self.progress.use(self.sampler)
        return decode_in_parts(self.sampler, self.progress.fit, state)

    def preview(self, state: State) -> Tensor:
        self.progress.use(self.sampler)
        with self.progress.looked(len(state.latents)):
            images = in_parts(self.progress.fit, state, self.sampler.preview)
            return torch.cat([self.score(batch) for batch in images])

    def look(self, state: State, evaluations: int) -> State:
        self.progress.use(self.sampler)
        with self.progress.timed():
            return look_in_parts(self.sampler, self.progress.fit, state, evaluations)

    def marks(self, state: State, prompt: str, stage: Stage | None = None) -> Marks:
        self.progress.use(self.sampler)
        with self.progress.looked(len(state.latents)):
            return marks_in_parts(self.sampler, self.progress, state, prompt, stage)

    def finish(
        self, state: State, lineages: Sequence[Lineage], *, parts: bool = False
    ) -> list[Candidate]:
        return _decoded(self, state, lineages, parts)

    def score(self, images: Tensor) -> Tensor:
        return self.progress.scorer(images)

    def ascend(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        *,
        parts: bool = False,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> Ascent:
        self.progress.use(self.sampler)
        leaf = noise.detach().clone().requires_grad_()
        pairs = parts_of(self.reward, self.prompt, parts)
        with self.progress.timed():
            images = self.sampler.render(leaf, True, mode, clamp, seeds)
            slopes = slopes_of(images, leaf, self.progress.scorer, pairs)
        rows = [i for i, finite in enumerate(slopes.total.isfinite().tolist()) if finite]
        lineages = [Lineage((Move(0, seeds[i]),), noise[i].detach().clone()) for i in rows]
        return slopes.ascent(_finished(self, images[rows], slopes.total[rows], lineages))

    def lean(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        shift: Shift,
        *,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> tuple[Tensor, Tensor]:
        leaf = shift.values.detach().clone().requires_grad_()
        other = self.variant(shift=Shift(shift.tokens, leaf))
        self.progress.use(other.sampler)
        with self.progress.timed():
            images = other.sampler.render(noise, True, mode, clamp, seeds)
            scores = self.progress.scorer.differentiable(images, self.reward)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        return scores.detach().to("cpu", torch.float64), gradient

    def variant(
        self,
        techniques: Sequence[Technique] | None = None,
        call: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        cache: float | None = None,
        shift: Shift | None = None,
    ) -> PipelineProblem:
        draft = self.draft or techniques is not None or bool(call) or cache is not None
        other = self.setting.other(techniques, call, prompt, cache, shift)
        return _variant(self, other, draft)

    def repeat(self, lineage: Lineage) -> Tensor:
        """The image [1, 3, H, W] of a lineage, made alone from the beginning."""
        if lineage.prompt not in (None, self.setting.prompt) or lineage.shift is not None:
            variant = self.variant(prompt=lineage.prompt, shift=lineage.shift)
            return variant.repeat(replace(lineage, shift=None))
        self.progress.use(self.sampler)
        return self.sampler.decode(finished(self.sampler, lineage))


def _time(problem: PipelineProblem) -> None:
    """Find out what an evaluation, a decode and a score take.

    They are made for one image, on a meter of its own: of the budget only seconds are used.
    """
    progress = problem.progress
    meter = Meter(stop=progress.meter.stop)
    scorer = replace(progress.scorer, meter=meter)
    trial = Progress(meter, Ranking(), scorer, Fit(1), torch.Generator())
    other = PipelineProblem(problem.setting, problem.prompt, problem.seed, trial)
    progress.use(None)
    try:
        for _ in range(2):
            # the first evaluation, decode and score warm up
            trial.sampling, trial.looking = Pace(), Pace()
            state = other.run(other.start([0]), 1)
            with suppress(BadScore):
                other.preview(state)
    finally:
        trial.use(None)
    progress.sampling, progress.looking = trial.sampling, trial.looking


def _variant(problem: PipelineProblem, setting: Setting, draft: bool) -> PipelineProblem:
    """A problem of another setting; without a shift of its own the one that was made for it before,
    since some methods ask at each step."""
    reuse = setting.shift is problem.setting.shift
    matches = (v for v in problem._variants if v.draft == draft and v.setting == setting)
    variant = next(matches, None) if reuse else None
    if variant is None:
        variant = type(problem)(setting, problem.prompt, problem.seed, problem.progress, draft)
        if reuse:
            problem._variants.append(variant)
    return variant


def _decoded(
    problem: PipelineProblem, state: State, lineages: Sequence[Lineage], parts: bool
) -> list[Candidate]:
    """Finished states as candidates, in batches that the memory holds."""
    progress, sampler, rows = problem.progress, problem.sampler, len(state.latents)
    if len(lineages) != rows:
        raise ValueError(f"finish needs {rows} lineages, one per image; got {len(lineages)}.")
    progress.use(sampler)
    marker = Marker.of(progress.scorer, problem.prompt, None) if parts else None
    candidates: list[Candidate] = []
    with progress.looked(rows):
        for images in in_parts(progress.fit, state, sampler.decode):
            known = lineages[len(candidates) : len(candidates) + len(images)]
            if marker is None:
                candidates += _finished(problem, images, problem.score(images), known)
            else:
                marks = marker(images)
                candidates += _finished(problem, images, marks.sums, known, marks.scores)
    return candidates


def _finished(
    problem: PipelineProblem,
    images: Tensor,
    scores: Tensor,
    lineages: Sequence[Lineage],
    parts: Tensor | None = None,
) -> list[Candidate]:
    """Finished images with their scores, and those of the reward's parts [R, B]; remembered unless
    they are drafts."""
    setting, dtype = problem.setting, problem.sampler.dtype
    pictures = images.detach().to("cpu", torch.float32)
    columns = [()] * len(images) if parts is None else map(tuple, parts.T.tolist())
    candidates = [
        Candidate(
            score, picture.clone(), setting.known(lineage, problem.prompt, dtype), parts=column
        )
        for score, picture, lineage, column in zip(
            scores.tolist(), pictures, lineages, columns, strict=True
        )
    ]
    for candidate in () if problem.draft else candidates:
        problem.progress.remember(candidate)
    return candidates
