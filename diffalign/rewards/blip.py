"""What the BLIP-shaped rewards share: texts as ids, and text read beside an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffalign.rewards.checkpoint import DAMAGED, Foreign, Source
from diffalign.rewards.network import warn_of_cut

CONTEXT = 35
"""Tokens that BLIP's rewards read."""


class Texts:
    """Texts as padded token ids of a BERT tokenizer; each text is read once."""

    def __init__(self, tokenizer: Foreign, owner: str, first: int | None = None) -> None:
        self.tokenizer, self.owner = tokenizer, owner
        # replaces the first token where BLIP was trained so
        self.first = first
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids [B, L] and mask [B, L] of texts, L that of the longest; warns where one is cut."""
        for text in texts:
            if text not in self._known:
                ids = self.tokenizer(text).input_ids
                warn_of_cut(self.owner, text, len(ids), CONTEXT)
                if len(ids) > CONTEXT:
                    ids = [*ids[: CONTEXT - 1], ids[-1]]
                self._known[text] = ids if self.first is None else [self.first, *ids[1:]]
        rows = [self._known[text] for text in texts]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        table = [row + [pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return torch.tensor(table, device=device), torch.tensor(mask, device=device)


def config_of(cls: Foreign, source: Source, owner: str, revision: str | None) -> Foreign:
    """The configuration of a BLIP model, its heads of 64 numbers as BLIP's are: transformers' own
    default for the text is 8 heads, which fits weights of 12 and gives other scores.

    Raises: ValueError where there is none.
    """
    try:
        config = cls.from_pretrained(source, revision=revision)
    except DAMAGED as error:
        raise ValueError(
            f"{owner}: no configuration of a BLIP model at {str(source)!r}: {error}"
        ) from error
    for part in (config.vision_config, config.text_config):
        part.num_attention_heads = part.hidden_size // 64
    return config


def read(encoder: nn.Module, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """States [B, L, D] of texts that attend to the tokens of their image [B, N, E]."""
    states: Tensor = encoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
    ).last_hidden_state
    return states
