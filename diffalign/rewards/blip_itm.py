"""BLIP's own judgement whether a text is about an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from diffalign.rewards.base import Facts
from diffalign.rewards.blip import Texts, config_of, read
from diffalign.rewards.checkpoint import Source, pretrained, tokenizer_of
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.preprocessing import fitted, normalised, wide


class BlipITM(NetworkReward):
    """Probability that the prompt is about the image, by BLIP's image-text matching head.

    ``source``: a hub id or folder of transformers with its tokenizer. The retrieval models of BLIP
    read the first token as it is.
    Paper: Li et al. 2022, arXiv:2201.12086. Reads 35 tokens, 384 pixels, aspect ratio ignored.
    """

    name = "blip-itm"
    facts = Facts(
        "BSD-3-Clause",
        "Salesforce/blip-itm-large-coco",
        "447 M",
        "0.9 GB + 0.5",
        "matching as such; not in the study behind the other figures",
    )

    def __init__(
        self,
        source: Source = facts.source,
        revision: str | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        from transformers import BlipConfig, BlipForImageTextRetrieval

        config = config_of(BlipConfig, source, self.name, revision)
        network = pretrained(BlipForImageTextRetrieval, source, self.name, revision, config=config)
        super().__init__(network, **placement)
        self.side = int(config.vision_config.image_size)
        self.texts = Texts(tokenizer_of(source, self.name, revision), self.name)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalised(fitted(images, self.side, "squash")).to(self.dtype)
        tokens = self.network.vision_model(pixel_values=pixels).last_hidden_state
        ids, mask = self.texts(prompts, images.device)
        first = read(self.network.text_encoder, ids, mask, tokens)[:, 0]
        return wide(self.network.itm_head(first)).softmax(-1)[:, 1]
