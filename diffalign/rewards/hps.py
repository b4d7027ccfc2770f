"""HPSv2: human preference score, versions 2.0 and 2.1. Their scores are not comparable."""

from __future__ import annotations

from typing import Unpack

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.clip_towers import ClipReward, load_towers
from diffalign.rewards.network import Placement
from diffalign.rewards.preprocessing import Fit


class HPSv21(ClipReward):
    """Human preference, version 2.1: cosine of CLIP ViT-H-14 tuned on ranked images.

    ``fit``: "pad" as the authors' package does, "crop" as ReNO and CARINOX do. ``source``: a hub
    id, folder or file in open_clip's format. Signs of overuse: saturated colours, smooth bright
    backgrounds.
    Paper: Wu et al. 2023, arXiv:2306.09341. Reads 77 tokens, 224 pixels.
    """

    name = "hps-v2-1"
    factor = 1.0
    span = (0.0, 0.5)
    files: tuple[str, ...] = ("HPS_v2.1_compressed.pt",)
    facts = Facts(
        "Apache-2.0",
        "xswu/HPSv2",
        "986 M, image side 632 M",
        "1.3 GB + 0.4",
        "general preference (.83 of pairs on HPDv2), non-spatial relations .54, 3D .42",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        fit: Fit = "pad",
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(load_towers(source, self.name, revision, self.files), **placement)
        self.fit = fit


class HPSv2(HPSv21):
    """Human preference, version 2.0: cosine of CLIP ViT-H-14 tuned on ranked images.

    As version 2.1 with its own weights. Paper: Wu et al. 2023, arXiv:2306.09341.
    """

    name = "hps-v2"
    files = ("HPS_v2_compressed.pt",)
    facts = Facts(
        "Apache-2.0",
        "xswu/HPSv2",
        "986 M, image side 632 M",
        "1.3 GB + 0.4",
        "general preference (.83 of pairs on HPDv2), little after version 2.1",
    )
