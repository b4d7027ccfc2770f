"""Scores of many questions: TIFA and DSG, by BLIP or a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.network import Placement
from diffalign.rewards.question_reward import (
    QuestionReward,
    Reader,
    place_of,
    reader_of,
    right_logs,
)
from diffalign.rewards.questions import Question, Questions, graph_of


class TIFA(QuestionReward):
    """Share of questions about the prompt that are answered right.

    ``questions``: prompt -> ``Question`` objects with choices, by a language model in the paper;
    None for one yes-or-no question for each noun phrase. ``soft``: the mean probability of the
    right answers instead of their share, with a gradient; ours. ``reader``: "blip", "vlm" or an
    object; ``source`` its weights.
    Paper: Hu et al. 2023, arXiv:2303.11897.
    """

    name = "tifa"
    facts = Facts(
        "that of the reader",
        "a reader's: BLIP by default",
        "385 M",
        "0.8 GB + 0.9",
        "counting .53, the best of all; colour .68 (with mPLUG and questions by a language model)",
    )

    def __init__(
        self,
        source: Source | None = None,
        revision: str | None = None,
        questions: Questions | None = None,
        reader: Literal["blip", "vlm"] | Reader = "blip",
        soft: bool = True,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(reader_of(reader, source, revision, self.name), questions, **placement)
        self.soft = soft
        self.differentiable = soft and self.reader.differentiable

    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        return self.right(logs, questions).mean()

    def right(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        """[K] probabilities of the right answers; else 1 where that is the likeliest choice."""
        probabilities = right_logs(logs, questions).exp()
        if self.soft:
            return probabilities
        likeliest = [int(row.argmax()) == place_of(q) for row, q in zip(logs, questions)]
        return probabilities.new_tensor(likeliest)


class DSG(TIFA):
    """Share of questions answered right, where a question counts only if those before it do.

    A colour counts only where its object is there. Parents are taken as they were answered, so a
    failure does not pass on to grandchildren; ``cascade`` makes it. ``soft`` multiplies
    probabilities instead; ours. Other options as ``TIFA``.
    Paper: Cho et al. 2023, arXiv:2310.18235.
    """

    name = "dsg"
    rule = staticmethod(graph_of)
    facts = Facts(
        "that of the reader",
        "a reader's: BLIP by default",
        "385 M",
        "0.8 GB + 0.9",
        "attributes that depend on objects; not in the study behind the other figures",
    )

    def __init__(
        self,
        source: Source | None = None,
        revision: str | None = None,
        questions: Questions | None = None,
        reader: Literal["blip", "vlm"] | Reader = "blip",
        soft: bool = True,
        cascade: bool = False,
        **placement: Unpack[Placement],
    ) -> None:
        super().__init__(source, revision, questions, reader, soft, **placement)
        self.cascade = cascade

    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        answers = self.right(logs, questions)
        values: list[Tensor] = []
        for place, question in enumerate(questions):
            value = answers[place]
            for parent in question.parents:
                if self.cascade and parent >= place:
                    raise ValueError(
                        f"dsg(cascade=True): {question.text!r} must come after question {parent}."
                    )
                value = value * (values[parent] if self.cascade else answers[parent])
            values.append(value)
        return torch.stack(values).mean()
