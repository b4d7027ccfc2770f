"""Rewards that ask questions about an image: what asks, and what is made of the answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, Unpack

import torch
from torch import Tensor, nn

from diffalign.rewards.checkpoint import Source
from diffalign.rewards.network import NetworkReward, Placement
from diffalign.rewards.questions import Question, Questions, questions_of, read_questions


class Reader(Protocol):
    """A network that answers questions about images."""

    network: nn.Module
    name: str
    # gradients flow to the images
    differentiable: bool
    # images at once before memory has said anything
    batch: int

    def log_choices(
        self, images: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[Tensor]]:
        """For each image and question the log-probabilities [C] of its choices; [1] of its answer
        where it has no choices."""
        ...


def reader_of(
    reader: Literal["blip", "vlm"] | Reader, source: Source | None, revision: str | None, owner: str
) -> Reader:
    """A reader by name, from its published weights or ``source``, or as it is."""
    if not isinstance(reader, str):
        return reader
    if reader == "blip":
        from diffalign.rewards.blip_reader import BlipReader

        return BlipReader(source or BlipReader.source, revision, owner)
    if reader == "vlm":
        from diffalign.rewards.vlm_reader import VlmReader

        return VlmReader(source or VlmReader.source, revision, owner)
    raise ValueError(f"{owner}: reader must be blip, vlm or an object; got {reader!r}.")


class QuestionReward(NetworkReward):
    """Base of rewards that combine answers; subclasses write ``combine``."""

    rule: ClassVar = staticmethod(questions_of)
    # what the reader's name is put behind
    kind: str = "questions"

    def __init__(
        self, reader: Reader, questions: Questions | None = None, **placement: Unpack[Placement]
    ) -> None:
        placement.setdefault("batch", reader.batch)
        super().__init__(reader.network, **placement)
        self.reader, self.questions = reader, questions
        self.differentiable = reader.differentiable

    def questions_for(self, prompt: str) -> tuple[Question, ...]:
        """The questions of a prompt."""
        return read_questions(self.questions, prompt, self.rule, self.name)

    @abstractmethod
    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        """One score of the answers: log-probabilities [C] of each question's choices."""

    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        table = [self.questions_for(prompt) for prompt in prompts]
        logs = self.reader.log_choices(images, table)
        return torch.stack([self.combine(row, questions) for row, questions in zip(logs, table)])


def right_logs(logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
    """Log-probabilities [K] of the right answers of K questions."""
    return torch.stack([row[place_of(question)] for row, question in zip(logs, questions)])


def place_of(question: Question) -> int:
    """Of the right answer among the choices."""
    return question.choices.index(question.answer) if question.choices else 0
