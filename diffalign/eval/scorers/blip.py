"""BLIP (Li et al. 2022, arXiv:2201.12086) as T2I-CompBench asks it: the probability of "yes".

Two things are put right that transformers' own class leaves out: the first token of a question is
the one that BLIP's encoder was trained with, and the answer's first step is read as logits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.core.types import Json, Pipeline
from diffalign.eval.scorers.pretrained import facts_of, normalised, pretrained, resized

if TYPE_CHECKING:
    from torch import Tensor

NAME = "Salesforce/blip-vqa-capfilt-large"
IDS = {"yes": 2748, "no": 2053, "start": 30522, "encode": 30523}
"""Tokens of the published vocabulary."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE, WORDS, TOKENS = 480, 50, 35
"""Side of the image in pixels, most words and most tokens of a question."""


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def question_of(phrase: str) -> str:
    """A noun phrase as a question, cleaned as the published program cleans it."""
    text = re.sub(r"[.!\"()*#:;~]", " ", f"{phrase}?".lower())
    return " ".join(text.split()[:WORDS])


def forms_of(answer: str) -> list[str]:
    """How an answer may be written: a number up to ten as a word and in digits."""
    text = answer.strip().lower()
    for number, word in enumerate(NUMBERS):
        if text in (word, str(number)):
            return [word, str(number)]
    return [text]


class Blip:
    """Answers questions about images by probabilities.

    ``ids``: the tokens of yes and no, of the decoder's start and of an encoded question.
    """

    def __init__(
        self,
        name: str = NAME,
        device: str = "cpu",
        *,
        side: int = SIDE,
        ids: dict[str, int] | None = None,
    ) -> None:
        from transformers import BertTokenizerFast, BlipForQuestionAnswering

        self.name, self.device, self.side = name, device, side
        self.model: Pipeline = pretrained(BlipForQuestionAnswering, name, device)
        self.tokenizer: Pipeline = BertTokenizerFast.from_pretrained(name)
        self.ids = ids or IDS
        for word in ("yes", "no"):
            token = self.tokenizer.convert_tokens_to_ids(word)
            if token != self.ids[word]:
                raise ValueError(
                    f"{name!r}: the token of {word!r} is {token}, and {self.ids[word]} was "
                    "expected; this is not the published vocabulary."
                )

    def facts(self) -> Json:
        """Name and hash of the network, and the side at which it sees images."""
        return facts_of(self.name, self.model) | {"side": self.side, "rule": "yes / (yes + no)"}

    def answers(self, image: Tensor, question: str, tokens: Sequence[int]) -> list[float]:
        """Probabilities of ``tokens`` as the first one of the answer, among the vocabulary."""
        import torch

        pixels = resized(image.to(self.device), (self.side, self.side), "bicubic")
        text = self.tokenizer(question, max_length=TOKENS, truncation=True, return_tensors="pt").to(
            self.device
        )
        text.input_ids[:, 0] = self.ids["encode"]
        with torch.no_grad():
            patches = self.model.vision_model(
                pixel_values=normalised(pixels, MEAN, STD)[None], interpolate_pos_encoding=True
            ).last_hidden_state
            states = self.model.text_encoder(
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones(patches.shape[:-1], device=self.device).long(),
            ).last_hidden_state
            logits = self.model.text_decoder(
                input_ids=torch.tensor([[self.ids["start"]]], device=self.device),
                encoder_hidden_states=states,
                encoder_attention_mask=text.attention_mask,
            ).logits
        probabilities = logits[0, 0].float().softmax(-1)
        return [float(probabilities[token]) for token in tokens]

    def yes(self, image: Tensor, phrase: str) -> float:
        """The probability that an image [3, H, W] shows a noun phrase."""
        yes, no = self.answers(image, question_of(phrase), [self.ids["yes"], self.ids["no"]])
        return yes / (yes + no)

    def correct(self, image: Tensor, question: str, answer: str) -> float:
        """The probability of an answer's first token, as Soft-TIFA reads it: of a number that of
        its word and that of its digits together."""
        texts = forms_of(answer)
        ids = {self.tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts}
        values = self.answers(image, question_of(question.rstrip("?")), sorted(ids))
        return min(sum(values), 1.0)
