"""The readers of ``emoji-clip`` as rewards: are the objects there, in their colours, as many as the
prompt says? And their mixture by the category of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.core import Reward
from diffalign.core.types import Json
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.rewards.base import BaseReward, Facts
from diffalign.rewards.category_aware import CategoryAware
from diffalign.rewards.emoji_clip import EmojiClip
from diffalign.rewards.emoji_judge import EmojiJudge, record_of

if TYPE_CHECKING:
    from diffalign.embedded.nets.clip import Clip

FACTS = Facts("Apache-2.0", "in the package", "3.2 M", "13 MB", "scenes of the embedded world")
MOST = 4
"""Objects of one class that the reader of numbers can count."""


class _Reader(BaseReward):
    """Log-probability by a reader of ``emoji-clip``, at most 0; its unit is the probability."""

    differentiable = True
    facts = FACTS

    def __init__(self, model: Clip | None = None) -> None:
        if model is None:
            from diffalign.embedded.load import load

            model = load("emoji-clip")
        self.model = model

    def unit(self, scores: Tensor) -> Tensor:
        """The probability."""
        return scores.exp()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs, numbers = self.model.read(images)
        return self.read(pairs, numbers, prompts)

    def read(self, pairs: Tensor, numbers: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] sums over each prompt's clauses, from logits [B, 80, 11] that a class is there in a
        colour, and [B, 80, 5] of how many."""
        records = [record_of(prompt, self.name) for prompt in prompts]
        return torch.stack(
            [
                torch.stack([self.clause(row, many, clause) for clause in record["include"]]).sum()
                for row, many, record in zip(pairs, numbers, records, strict=True)
            ]
        )

    def clause(self, pairs: Tensor, numbers: Tensor, clause: Json) -> Tensor:
        """The log-probability of one clause."""
        raise NotImplementedError


class EmojiObjects(_Reader):
    """Log-probability that every object of the prompt is there, by the reader of ``emoji-clip``.

    In whatever colour; for prompts in GenEval's grammar. Differentiable. ``model`` is a loaded
    ``emoji-clip``, None loads the embedded one. Cost: that of ``emoji-clip``. Raises ValueError for
    a prompt outside the grammar.
    """

    name = "emoji-objects"

    def clause(self, pairs: Tensor, numbers: Tensor, clause: Json) -> Tensor:
        # the probability of none is the product over colours, its log a sum
        none = -F.softplus(pairs[OBJECTS.index(clause["class"])]).sum()
        return torch.log(-torch.expm1(none.clamp(max=-1e-6)))


class EmojiColours(_Reader):
    """Log-probability that every object with a colour is there in it, by the reader of
    ``emoji-clip``.

    0 for prompts of GenEval's grammar without colours. Differentiable. ``model`` is a loaded
    ``emoji-clip``, None loads the embedded one. Cost: that of ``emoji-clip``. Raises ValueError for
    a prompt outside the grammar.
    """

    name = "emoji-colours"

    def clause(self, pairs: Tensor, numbers: Tensor, clause: Json) -> Tensor:
        if "color" not in clause:
            return pairs.new_zeros(())
        place = OBJECTS.index(clause["class"]), COLOURS.index(clause["color"])
        return F.logsigmoid(pairs[place])


class EmojiNumbers(_Reader):
    """Log-probability that there are as many of each object as the prompt says, by the reader of
    ``emoji-clip``.

    For prompts in GenEval's grammar and up to four objects of a class. Differentiable. ``model`` is
    a loaded ``emoji-clip``, None loads the embedded one. Cost: that of ``emoji-clip``. Raises
    ValueError for a prompt outside the grammar, or above four.
    """

    name = "emoji-numbers"

    def clause(self, pairs: Tensor, numbers: Tensor, clause: Json) -> Tensor:
        if clause["count"] > MOST:
            raise ValueError(
                f"{self.name}: the reader counts to {MOST}; the prompt asks for "
                f"{clause['count']} of {clause['class']!r}. Use 'emoji-judge'."
            )
        return numbers[OBJECTS.index(clause["class"])].log_softmax(0)[clause["count"]]


def tag_of(prompt: str) -> Mapping[str, float]:
    """GenEval's tag of a prompt as its one category. Raises: ValueError outside the grammar."""
    return {str(record_of(prompt, EmojiAware.name)["tag"]): 1.0}


class EmojiAware(CategoryAware):
    """CARINOX's mixture for the embedded world: similarity and readers of ``emoji-clip``, and
    ``emoji-judge``.

    Each is weighted by how its score went with the verdicts of ``emoji-judge-audit`` on prompts of
    the same GenEval tag. The weights are ``AWARE``, by CARINOX's rule from 192 images of 48 tuning
    prompts (``benchmarks/ratings.py``). Differentiable, for prompts in GenEval's grammar and up to
    four objects of a class. Paper: Kasaei et al. 2025, arXiv:2509.17458, section 4. Cost: that of
    ``emoji-clip`` and ``emoji-judge``. Raises ValueError for other prompts.
    """

    name = "emoji-aware"
    facts = Facts("Apache-2.0", "in the package", "4.2 M", "17 MB", "scenes of the embedded world")

    def __init__(self) -> None:
        from diffalign.embedded.load import load

        self.clip = load("emoji-clip")
        self.readers = [
            EmojiObjects(self.clip), EmojiColours(self.clip), EmojiNumbers(self.clip)
        ]  # fmt: skip
        self.similarity, self.judge = EmojiClip(self.clip), EmojiJudge()
        super().__init__([self.similarity, *self.readers, self.judge], AWARE, tag_of)
        self.name = EmojiAware.name

    def parts_of(self, prompt: str) -> list[tuple[float, Reward]]:
        """Those that have a weight; the others would cost a backward pass for nothing."""
        return [(weight, part) for weight, part in super().parts_of(prompt) if weight > 0]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The sum, with one pass of ``emoji-clip``."""
        embedding = self.clip.image(images, normalize=False)
        cosine = (F.normalize(embedding, dim=-1) * self.clip.text(prompts)).sum(-1)
        pairs, numbers = self.clip.heads(embedding)
        scores = [reader.read(pairs, numbers, prompts) for reader in self.readers]
        units = torch.stack(
            [
                self.similarity.unit(cosine),
                *(r.unit(score) for r, score in zip(self.readers, scores, strict=True)),
                self.judge.unit(self.judge(images, prompts)),
            ]
        )
        table = units.new_tensor([self.weights_for(prompt) for prompt in prompts])
        return (units * table.T).sum(0)


AWARE: dict[str, tuple[float, ...]] = {
    "single_object": (1.13, 2.14, 0.0, 0.0, 1.73),
    "two_object": (1.35, 1.22, 0.0, 1.07, 1.37),
    "counting": (1.68, 0.0, 0.0, 1.03, 2.3),
    "colors": (0.59, 1.35, 1.29, 0.32, 1.45),
    "position": (1.57, 0.9, 0.0, 0.91, 1.62),
    "color_attr": (1.28, 0.78, 0.65, 1.12, 1.17),
}
"""GenEval's tag -> weights of similarity, objects, colours, numbers and judge."""
