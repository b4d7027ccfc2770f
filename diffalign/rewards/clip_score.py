"""CLIPScore."""

from __future__ import annotations

from typing import Unpack

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.clip_towers import ClipReward, load_towers
from diffalign.rewards.network import Placement


class ClipScore(ClipReward):
    """Similarity of image and prompt in CLIP ViT-H-14: ``100 cos``, with the model's own factor.

    Other conventions: 2.5 max(cos, 0) in the paper, raw cosine of ViT-B-32 in T2I-CompBench.
    ``source``: a hub id or folder of transformers, or a file in open_clip's format.
    Paper: Hessel et al. 2021, arXiv:2104.08718. Reads 77 tokens, 224 pixels, centre crop.
    """

    name = "clip"
    span = (0.0, 100.0)
    facts = Facts(
        "MIT",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "986 M, image side 632 M",
        "1.3 GB + 0.4",
        "non-spatial relations .44; else weak: colour .28, shape .29, texture .53",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(load_towers(source, self.name, revision), **placement)
