"""Videos that are not finished: what the model foresees, and what the parts of a reward say."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.alignment.progress import Progress
from diffalign.alignment.scoring import Fit, Scorer
from diffalign.alignment.setting import AnySampler
from diffalign.core.errors import UnsupportedModel
from diffalign.core.reward import Reward
from diffalign.core.sampler import State, join
from diffalign.core.search import Marks, Stage
from diffalign.rewards.base import BaseReward
from diffalign.rewards.weighted import parts_of
from diffalign.search.video.sampler import ChunkSampler


@dataclass(frozen=True, slots=True)
class Marker:
    """Scores of each part of a reward against the text of a stage."""

    scorer: Scorer
    parts: tuple[tuple[float, Reward], ...]

    @classmethod
    def of(cls, scorer: Scorer, prompt: str, stage: Stage | None) -> Marker:
        """For the reward of ``scorer``, with another text."""
        parts = parts_of(scorer.reward, scorer.prompt)
        if stage is not None:
            parts = [(w, r.at(stage) if isinstance(r, BaseReward) else r) for w, r in parts]
        return cls(replace(scorer, prompt=prompt), tuple(parts))

    def __call__(self, videos: Tensor) -> Marks:
        """Of videos [B, T, 3, H, W]; they count as B scores, as those of the whole reward do."""
        self.scorer.meter.charge(rewards=len(videos))
        weights, rows = [], []
        for weight, part in self.parts:
            short = videos.shape[1] < getattr(part, "least", 1)
            weights.append(0.0 if short else weight)
            rows.append(
                torch.zeros(len(videos), dtype=torch.float64)
                if short
                else replace(self.scorer, reward=part).checked(videos)
            )
        frames = videos[:, -1].detach().to("cpu", torch.float32)
        return Marks(tuple(weights), torch.stack(rows), frames.clone())


def marks_in_parts(
    sampler: AnySampler, progress: Progress, state: State, prompt: str, stage: Stage | None
) -> Marks:
    """Of videos as far as they are, decoded and scored in batches that the memory holds."""
    marker = Marker.of(progress.scorer, prompt, stage)
    rows = len(state.latents)
    marks = list(progress.fit.parts(rows, lambda part: marker(sampler.preview(state.select(part)))))
    scores = torch.cat([part.scores for part in marks], 1)
    return Marks(marks[0].weights, scores, torch.cat([part.frames for part in marks]))


def look_in_parts(sampler: AnySampler, fit: Fit, state: State, evaluations: int) -> State:
    """First chunks run to an evaluation, in such batches.

    Raises: ``UnsupportedModel`` for a sampler of anything but chunks.
    """
    if not isinstance(sampler, ChunkSampler):
        raise UnsupportedModel("Only a video that is made chunk after chunk is looked ahead.")
    rows = len(state.latents)
    return join(list(fit.parts(rows, lambda part: sampler.look(state.select(part), evaluations))))
