"""BLIP's question answering network as a reader of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.blip import Texts, config_of, read
from diffalign.rewards.checkpoint import Source, pretrained, tokenizer_of
from diffalign.rewards.preprocessing import fitted, normalised, wide
from diffalign.rewards.questions import Question

SIDE = 480
"""Pixels that the published network was trained with. The hub's copy holds positions for 384, made
from those for 480; they are resized back, so scores differ a little from the original file's."""


class BlipReader:
    """``Salesforce/blip-vqa-capfilt-large`` or its kind: the first token of an answer decides.

    One image is encoded once for all its questions. An answer that is compared with others must
    differ from them in its first token.
    """

    name = "blip-vqa"
    source = "Salesforce/blip-vqa-capfilt-large"
    differentiable = True
    batch = 8

    def __init__(self, source: Source, revision: str | None, owner: str) -> None:
        from transformers import BlipConfig, BlipForQuestionAnswering

        config = config_of(BlipConfig, source, owner, revision)
        self.network = pretrained(BlipForQuestionAnswering, source, owner, revision, config=config)
        self.owner = owner
        self.tokenizer = tokenizer_of(source, owner, revision)
        # BLIP was trained with [ENC] in front of a question; its number follows that of [DEC]
        self.start = int(config.text_config.bos_token_id)
        self.texts = Texts(self.tokenizer, owner, first=self.start + 1)

    def log_choices(
        self, images: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[Tensor]]:
        network = self.network
        dtype = next(network.parameters()).dtype
        pixels = normalised(fitted(images, SIDE, "squash")).to(dtype)
        tokens = network.vision_model(
            pixel_values=pixels, interpolate_pos_encoding=True
        ).last_hidden_state
        flat = [question for row in questions for question in row]
        owners = [i for i, row in enumerate(questions) for _ in row]
        ids, mask = self.texts([question.text for question in flat], images.device)
        states = read(network.text_encoder, ids, mask, tokens[owners])
        logits = self._first_logits(states, mask.sum(1).tolist())
        logs = iter(self._log_choices(row, q) for row, q in zip(logits, flat))
        return [[next(logs) for _ in row] for row in questions]

    def _first_logits(self, states: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """[V] logits of the first token of each answer. transformers' decoder takes no mask of the
        question, so questions of one length are answered together, without padding."""
        logits: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [i for i, size in enumerate(lengths) if size == length]
            start = torch.full((len(rows), 1), self.start, device=states.device)
            output = self.network.text_decoder(
                input_ids=start, encoder_hidden_states=states[rows, :length], use_cache=False
            )
            logits |= dict(zip(rows, wide(output.logits[:, -1])))
        return [logits[i] for i in range(len(lengths))]

    def _log_choices(self, logits: Tensor, question: Question) -> Tensor:
        """Log-probabilities of the choices; of the answer among all tokens without choices."""
        if not question.choices:
            return logits.log_softmax(-1)[[self._token(question.answer, question)]]
        tokens = [self._token(choice, question) for choice in question.choices]
        if len(set(tokens)) < len(tokens):
            raise ValueError(
                f"{self.owner}: two choices of {question.text!r} begin with the same token, so "
                f"that BLIP cannot tell them apart: {', '.join(question.choices)}."
            )
        return logits[tokens].log_softmax(-1)

    def _token(self, answer: str, question: Question) -> int:
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False).input_ids
        if not ids or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{self.owner}: the answer {answer!r} of {question.text!r} has no token."
            )
        return ids[0]
