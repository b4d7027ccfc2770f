"""Linear search: whole videos from fresh noise, the best one is the result."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.core.search import ByChunks
from diffalign.search.best_of_n import BestOfN


@dataclass(frozen=True)
class LinearSearch(BestOfN):
    """Draw whole videos from fresh noise and keep the best: ``BestOfN`` of videos.

    A pipeline that makes a video chunk after chunk is run chunk after chunk, so that its videos are
    those of ``TreeOfFrames`` without branches; any other one in one piece.

    Paper: Liu et al. 2025, arXiv:2503.18942 (Video-T1), random linear search.
    Cost: N trajectories, N decoded and scored videos.
    """

    @property
    def chunks(self) -> ByChunks:
        return "wants"
