"""PickScore."""

from __future__ import annotations

from typing import Unpack

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.clip_towers import ClipReward, load_towers
from diffalign.rewards.network import Placement


class PickScore(ClipReward):
    """Preference of a web application's users: ``100 cos`` of CLIP ViT-H-14 tuned on choices.

    The softmax of several scores of one prompt is the chance to be chosen; a difference of 1 is
    73 to 27. ``source``: a hub id or folder of transformers.
    Paper: Kirstain et al. 2023, arXiv:2305.01569. Reads 77 tokens, 224 pixels, centre crop.
    """

    name = "pick-score"
    span = (0.0, 26.0)
    facts = Facts(
        "MIT",
        "yuvalkirstain/PickScore_v1",
        "986 M, image side 632 M",
        "1.3 GB + 0.4",
        "general preference (.80 of pairs on HPDv2); weak on composition, .11 over six categories",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(load_towers(source, self.name, revision), **placement)
