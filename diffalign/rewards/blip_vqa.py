"""Rewards that ask BLIP about the parts of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from diffalign.rewards.base import Facts
from diffalign.rewards.blip_reader import BlipReader
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.network import Placement
from diffalign.rewards.question_reward import QuestionReward, right_logs
from diffalign.rewards.questions import Question, Questions, phrases_of, questions_of

SIZE, MEMORY = "385 M", "0.8 GB + 0.9"


def phrase_questions(prompt: str) -> tuple[Question, ...]:
    """ "a red car" -> "a red car?", as T2I-CompBench asks, for each phrase by rules."""
    return tuple(Question(f"{phrase}?") for phrase in phrases_of(prompt)) or questions_of(prompt)


class BlipVQA(QuestionReward):
    """Product of BLIP's answers "yes" to each noun phrase of the prompt (B-VQA).

    ``questions``: prompt -> questions, a table or a function; None for phrases by rules, while
    T2I-CompBench takes them from spaCy. ``log``: the sum of logarithms, whose gradient stays large
    where the product is near 0. ``source``: a hub id or folder of transformers with its tokenizer.
    Paper: Huang et al. 2023, arXiv:2307.06350. Reads 35 tokens, 480 pixels, aspect ratio ignored.
    """

    name = "blip-vqa"
    rule = staticmethod(phrase_questions)
    facts = Facts(
        "BSD-3-Clause",
        BlipReader.source,
        SIZE,
        MEMORY,
        "colour .61, texture .69; shape .39, counting .44",
    )

    def __init__(
        self,
        source: Source = BlipReader.source,
        revision: str | None = None,
        questions: Questions | None = None,
        log: bool = False,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(BlipReader(source, revision, self.name), questions, **placement)
        self.log = log
        if log:
            self.span = (-5.0, 0.0)

    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        total = right_logs(logs, questions).sum()
        return total if self.log else total.exp()


class DAScore(QuestionReward):
    """Mean of BLIP's probability of "yes", among all words, over one question for each assertion.

    ``questions``: prompt -> questions, a table or a function, by a language model in the paper;
    None for one question for each noun phrase. The authors accept an image at .85.
    Paper: Singh and Zheng 2023, arXiv:2307.04749. Reads 35 tokens, 480 pixels; no aspect ratio.
    """

    name = "da-score"
    facts = Facts(
        "BSD-3-Clause",
        BlipReader.source,
        SIZE,
        MEMORY,
        "colour .77, the best of all; texture .71, all six categories .56",
    )

    def __init__(
        self,
        source: Source = BlipReader.source,
        revision: str | None = None,
        questions: Questions | None = None,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(BlipReader(source, revision, self.name), questions, **placement)

    def questions_for(self, prompt: str) -> tuple[Question, ...]:
        return tuple(
            Question(q.text, q.answer, (), q.parents) for q in super().questions_for(prompt)
        )

    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        return right_logs(logs, questions).exp().mean()
