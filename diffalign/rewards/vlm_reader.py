"""A vision-language model as a reader of images: the first word of its answer decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.checkpoint import Source, pretrained
from diffalign.rewards.preprocessing import wide
from diffalign.rewards.questions import Question
from diffalign.rewards.qwen_images import QWEN, as_dtype, inputs_of, processor_of


class VlmReader:
    """A model of ``AutoModelForImageTextToText``; one forward pass for each question.

    ``spellings``: whether "Yes", "yes" and both with a space before count as one answer; without
    it only the answer as it is written counts. Differentiable for Qwen2-VL, Qwen2.5-VL and
    Qwen3-VL, whose way of cutting images into patches is rebuilt here.
    """

    source = "Qwen/Qwen3-VL-2B-Instruct"
    batch = 1

    def __init__(
        self, source: Source, revision: str | None, owner: str, spellings: bool = True
    ) -> None:
        from transformers import AutoModelForImageTextToText

        self.network = pretrained(AutoModelForImageTextToText, source, owner, revision)
        self.processor = processor_of(source, owner, revision)
        self.differentiable = self.network.config.model_type in QWEN
        self.owner, self.spellings = owner, spellings
        self.name = str(source).rstrip("/").rpartition("/")[2]

    def log_choices(
        self, images: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[Tensor]]:
        return [
            [self._log_choices(self._logits(image, question.text), question) for question in row]
            for image, row in zip(images, questions)
        ]

    def _logits(self, image: Tensor, text: str) -> Tensor:
        """[V] logits of the first token of the answer."""
        dtype = next(self.network.parameters()).dtype
        inputs = inputs_of(self.processor, image, text, self.differentiable)
        output = self.network(**as_dtype(inputs, dtype), logits_to_keep=1, use_cache=False)
        return wide(output.logits[0, -1])

    def _log_choices(self, logits: Tensor, question: Question) -> Tensor:
        logs = logits.log_softmax(-1)
        answers = question.choices or (question.answer,)
        tokens = [self._tokens(answer) for answer in answers]
        if len(set().union(*tokens)) < sum(map(len, tokens)):
            raise ValueError(
                f"{self.owner}: two choices of {question.text!r} begin with the same token, so "
                f"that their first word cannot tell them apart: {', '.join(answers)}."
            )
        sums = torch.stack([logs[sorted(ids)].logsumexp(0) for ids in tokens])
        return sums.log_softmax(0) if question.choices else sums

    def _tokens(self, answer: str) -> set[int]:
        """First tokens of an answer in its spellings; a token of blanks says nothing."""
        tokenizer = self.processor.tokenizer
        words = {answer}
        if self.spellings:
            words |= {answer.lower(), answer.capitalize()}
            words |= {f" {word}" for word in words}
        firsts = {tokenizer.encode(word, add_special_tokens=False)[0] for word in words}
        return {token for token in firsts if tokenizer.decode([token]).strip()}
