"""VQAScore: ask a vision-language model whether the image shows the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from diffalign.rewards.base import Facts
from diffalign.rewards.checkpoint import Source
from diffalign.rewards.network import Placement
from diffalign.rewards.question_reward import QuestionReward, right_logs
from diffalign.rewards.questions import Question
from diffalign.rewards.vlm_reader import VlmReader


class VQAScore(QuestionReward):
    """Probability that a vision-language model answers "Yes" when asked if the image shows the
    prompt.

    The current form of the authors' package: chat template, first token, all words. Scores of
    different models are not comparable, so the name holds the model. ``log``: its logarithm, whose
    gradient stays large where the probability is near 0 or 1. ``source``: a hub id or folder of
    ``AutoModelForImageTextToText``; with a gradient for Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
    Paper: Lin et al. 2024, arXiv:2404.01291. No limit of words; the model's own image size.
    """

    name = "vqa-score"
    facts = Facts(
        "that of the model",
        VlmReader.source,
        "2.1 B",
        "4.3 GB + 2",
        "complex prompts .64, 2D positions .53, overall .61 (with CLIP-FlanT5-XXL)",
    )

    def __init__(
        self,
        source: Source = VlmReader.source,
        revision: str | None = None,
        log: bool = False,
        **placement: Unpack[Placement],
    ) -> None:
        reader = VlmReader(source, revision, self.name, spellings=False)
        super().__init__(reader, **placement)
        self.log = log
        self.name = f"vqa-score({reader.name})"
        if log:
            self.span = (-5.0, 0.0)

    def questions_for(self, prompt: str) -> tuple[Question, ...]:
        text = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        return (Question(text, "Yes", ()),)

    def combine(self, logs: Sequence[Tensor], questions: Sequence[Question]) -> Tensor:
        log = right_logs(logs, questions)[0]
        return log if self.log else log.exp()
