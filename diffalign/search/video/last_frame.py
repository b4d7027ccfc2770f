"""Image-to-video pipelines: each chunk begins with the last frame of the one before."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from diffalign.core.types import Keywords
from diffalign.seams.swap import original_class
from diffalign.search.video.frames import FrameExpander


class LastFrame(FrameExpander):
    """Chains any image-to-video pipeline that diffalign knows: ``image`` is the last frame, and the
    first frame of the new clip, which repeats it, is dropped.

    Nothing of the motion is carried over, and quality falls with each chunk: use a pipeline that
    reads more of the prefix where there is one. The first chunk needs ``image``.
    """

    pipelines = (
        "WanImageToVideoPipeline",
        "CogVideoXImageToVideoPipeline",
        "LTXImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    )
    reads = 1

    def behind(self, tail: Tensor | None) -> Keywords:
        if tail is None:
            if self.call.get("image") is None:
                raise ValueError(
                    f"{original_class(self.pipe).__name__} begins with an image; give image=... "
                    "or continue a clip."
                )
            return {}
        # in 8 bits, as the image processors of all these pipelines expect it
        pixels = (tail[-1].permute(1, 2, 0) * 255).round().to(torch.uint8)
        return {"image": Image.fromarray(pixels.numpy())}
