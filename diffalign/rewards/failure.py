"""What a failure of a generator is: an ensemble to search with, and a judge that confirms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.core import Reward
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.rewards.base import BaseReward, Facts
from diffalign.rewards.emoji_judge import EmojiJudge, record_of
from diffalign.tasks.geneval.verdict import Detection, Thresholds, verdict

if TYPE_CHECKING:
    from diffalign.embedded.nets.clip import Clip


NAME = "emoji-failure"


class Member(Protocol):
    """A classifier of an ensemble."""

    def log_p(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Log-probability [B] that each image shows its prompt; differentiable."""
        ...

    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether it does not, bool [B]."""
        ...


class Below:
    """A reward as a member: a failure is a score below ``threshold``."""

    def __init__(self, reward: Reward, threshold: float) -> None:
        self.reward, self.threshold = reward, threshold

    def log_p(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)

    @torch.no_grad()
    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts) < self.threshold


class Failure(BaseReward):
    """Minus the mean log-probability that ``members`` give the prompt: high where all of them see
    something else.

    ``fails`` needs all members to agree; ``confirms`` asks ``judge``, which is none of them.
    ``target``: a prompt that the images are to show instead; a failure is then that they show it.
    Differentiable. Cost: that of the members; ``confirms``: that of the judge.
    Raises: ValueError without members, or where the judge is a member.
    """

    differentiable = True
    name = "failure"

    def __init__(self, members: Sequence[Member], judge: Member, target: str | None = None) -> None:
        if not members or any(member is judge for member in members):
            raise ValueError(
                "Failure(members=..., judge=...) needs at least one member, and a judge that is "
                f"none of them; got {len(members)} members."
            )
        self.members, self.judge, self.target = list(members), judge, target

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sign = -1.0 if self.target is None else 1.0
        rows = [member.log_p(images, self._texts(prompts)) for member in self.members]
        return sign * torch.stack(rows).mean(0)

    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether all members see the failure, bool [B]."""
        return torch.stack([self._seen(m, images, prompts) for m in self.members]).all(0)

    def confirms(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether the judge sees it too, bool [B]."""
        return self._seen(self.judge, images, prompts)

    def _texts(self, prompts: Sequence[str]) -> Sequence[str]:
        return prompts if self.target is None else [self.target] * len(prompts)

    def _seen(self, member: Member, images: Tensor, prompts: Sequence[str]) -> Tensor:
        fails = member.fails(images, self._texts(prompts))
        return fails if self.target is None else ~fails


class Finder(Protocol):
    """A model that finds objects, as the embedded judges do."""

    thresholds: Thresholds

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """The objects of each of ``images`` [B, 3, H, W] in [0, 1]."""
        ...


class Verdicts:
    """GenEval's verdict of a judge as a member; ``reward`` is its smooth form, where one is
    needed."""

    def __init__(self, judge: Finder, reward: Reward | None = None) -> None:
        self.judge, self.reward = judge, reward

    def log_p(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.reward is None:
            raise ValueError("These verdicts have no smooth form; use them to confirm only.")
        return self.reward(images, prompts)

    @torch.no_grad()
    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(self.judge.detect(images), prompts, strict=True)
        wrong = [
            not verdict(record_of(p, NAME), d, self.judge.thresholds).correct for d, p in pairs
        ]
        return torch.tensor(wrong, device=images.device)


class Heads:
    """The readers of ``emoji-clip`` as a member: a failure is an object of the prompt that is not
    among the ``top`` likeliest classes."""

    def __init__(self, model: Clip, top: int = 3) -> None:
        self.model, self.top = model, top

    def log_p(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs, numbers = self.model.read(images)
        rows = []
        for i, prompt in enumerate(prompts):
            total = pairs.new_zeros(())
            for clause in record_of(prompt, NAME)["include"]:
                kind = OBJECTS.index(clause["class"])
                logits = pairs[i, kind]
                if "color" in clause:
                    total = total + F.logsigmoid(logits[COLOURS.index(clause["color"])])
                else:
                    total = total + F.logsigmoid(logits.amax())
                if 1 < clause["count"] < numbers.shape[-1]:
                    total = total + numbers[i, kind].log_softmax(0)[clause["count"]]
            rows.append(total)
        return torch.stack(rows)

    @torch.no_grad()
    def fails(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        best = self.model.read(images)[0].amax(-1).topk(self.top, dim=1).indices.tolist()
        wrong = [
            any(OBJECTS.index(c["class"]) not in kinds for c in record_of(prompt, NAME)["include"])
            for kinds, prompt in zip(best, prompts, strict=True)
        ]
        return torch.tensor(wrong, device=images.device)


class EmojiFailure(Failure):
    """Failures on the embedded world: ``emoji-judge`` and the readers of ``emoji-clip`` search,
    ``emoji-judge-audit`` confirms. Prompts must be in GenEval's grammar."""

    name = NAME
    facts = Facts("Apache-2.0", "in the package", "5.3 M", "21 MB", "failures of embedded models")

    def __init__(self, target: str | None = None) -> None:
        from diffalign.embedded.load import load

        judge = load("emoji-judge")
        members = (Verdicts(judge, EmojiJudge(judge)), Heads(load("emoji-clip")))
        super().__init__(members, Verdicts(load("emoji-judge-audit")), target)
