"""LTX-Video with conditions: a clip at frame 0."""

from __future__ import annotations

from torch import Tensor

from diffalign.core.types import Keywords
from diffalign.search.video.frames import FrameExpander


class LTXCondition(FrameExpander):
    """Extends ``LTXConditionPipeline`` by a condition of the last frames at frame 0.

    ``image_cond_noise_scale`` is 0 unless the call says otherwise: the pipeline's own 0.15 would
    perturb what it reads.
    """

    pipelines = ("LTXConditionPipeline",)
    sets = ("conditions", "image", "video", "denoise_strength")

    def behind(self, tail: Tensor | None) -> Keywords:
        if tail is None:
            return {}
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        condition = LTXVideoCondition(video=tail, frame_index=0, strength=1.0)
        noise = self.call.get("image_cond_noise_scale", 0.0)
        return {"conditions": [condition], "image_cond_noise_scale": noise}
