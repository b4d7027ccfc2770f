"""What the parts of a reward say of videos that are not finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.alignment.scoring import Scorer
from diffalign.core.reward import Reward
from diffalign.core.search import Marks, Stage
from diffalign.rewards.base import BaseReward
from diffalign.rewards.weighted import parts_of


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


def joined(marks: Sequence[Marks]) -> Marks:
    """Of all videos of several batches, in order."""
    scores = torch.cat([part.scores for part in marks], 1)
    return Marks(marks[0].weights, scores, torch.cat([part.frames for part in marks]))
