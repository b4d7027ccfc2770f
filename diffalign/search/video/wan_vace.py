"""Wan VACE: known frames and a mask of what is to be made."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.core.types import Keywords
from diffalign.search.video.frames import FrameExpander


class WanVACE(FrameExpander):
    """Extends ``WanVACEPipeline`` by ``video`` and ``mask``: the last frames of the prefix, then
    grey frames to be made. Any number of frames may be known; the pipeline takes one video."""

    pipelines = ("WanVACEPipeline",)
    sets = ("video", "mask")

    def behind(self, tail: Tensor | None) -> Keywords:
        if tail is None:
            return {}
        missing = self.window - len(tail)
        grey = tail.new_full((missing, *tail.shape[1:]), 0.5)
        mask = torch.cat([torch.zeros_like(tail), torch.ones_like(grey)])
        return {"video": torch.cat([tail, grey])[None], "mask": mask[None]}
