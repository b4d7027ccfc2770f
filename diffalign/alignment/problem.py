"""One prompt, one pipeline and one reward, as a method sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.alignment.ascent import ascent_of, parts_of
from diffalign.alignment.parts import decode_in_parts, run_in_parts, twist_in_parts
from diffalign.alignment.progress import Progress
from diffalign.alignment.setting import Setting, finished
from diffalign.core import Meter, State, Technique
from diffalign.core.reward import Reward
from diffalign.core.sampler import Clamp, Mode
from diffalign.core.search import Ascent, Candidate, Lineage, Move
from diffalign.core.seeds import seed_of


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
        numbers = self.progress.numbers(count)
        return [seed_of(self.prompt, number, self.seed) for number in numbers]

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        return self.progress.room(count, self.sampler.price(first, last), scores)

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
            known = lineages[len(candidates) : len(candidates) + len(images)]
            candidates += self._candidates(images, self.score(images), known)
        return candidates

    def _candidates(
        self, images: Tensor, scores: Tensor, lineages: Sequence[Lineage]
    ) -> list[Candidate]:
        """Finished images with their scores; remembered unless they are drafts."""
        text = None if self.setting.prompt == self.prompt else self.setting.prompt
        pictures = images.detach().to("cpu", torch.float32)
        candidates = []
        for score, picture, lineage in zip(scores.tolist(), pictures, lineages, strict=True):
            known = replace(lineage, prompt=text) if lineage.prompt is None else lineage
            candidates.append(Candidate(score, picture.clone(), known))
            if not self.draft:
                self.progress.remember(candidates[-1])
        return candidates

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
        images = self.sampler.render(leaf, True, mode, clamp, seeds)
        ascent = ascent_of(images, leaf, self.progress.scorer, parts_of(self.reward, parts))
        starts = noise.detach().clone()
        lineages = [Lineage((Move(0, seed),), start) for seed, start in zip(seeds, starts)]
        self._candidates(images, ascent.scores, lineages)
        return ascent

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
        self.progress.use(self.sampler)
        return self.sampler.decode(finished(self.sampler, lineage))
