"""Several rewards as one: a weighted sum of scores on a common scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.core import Reward, Stage
from diffalign.rewards.base import BaseReward, Facts, load

# "2*clip:dtype=bf16"
TERM = re.compile(r"(?:(?P<weight>-?\d+(?:\.\d+)?)\*)?(?P<reward>[a-z][\w.-]*(?::.+)?)")


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of a reward's scores on a set of images."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> Scale:
        """The scale of scores [N]. Raises ValueError for fewer than two, or all equal."""
        if scores.numel() < 2 or not float(scores.std()) > 0:
            raise ValueError(
                "Scale.of(scores=...) needs at least two scores that differ; got "
                f"{scores.flatten()[:4].tolist()}."
            )
        return cls(float(scores.mean()), float(scores.std()))


class Weighted(BaseReward):
    """``sum_i w_i (R_i - mean_i) / std_i``.

    ``rewards``: name or object -> weight. ``scales``: scale of each by its place, so that a unit of
    every part is one standard deviation (the z-score, an honest default: measure it with
    ``Scale.of`` on images of the model); None leaves the scores as they are.
    Differentiable where all parts are. Cost: the sum of the parts'.
    Raises: ValueError without rewards, for weights that are not finite, or scales of another
    number.
    """

    def __init__(
        self,
        rewards: Mapping[str | Reward, float] | Sequence[tuple[str | Reward, float]],
        scales: Sequence[Scale] | None = None,
    ) -> None:
        items = list(rewards.items()) if isinstance(rewards, Mapping) else list(rewards)
        if not items:
            raise ValueError("Weighted(rewards=...) needs at least one reward; got none.")
        if scales is not None and len(scales) != len(items):
            raise ValueError(
                f"Weighted(scales=...) needs one for each of {len(items)} rewards; got "
                f"{len(scales)}."
            )
        places = scales or [Scale()] * len(items)
        for (_, weight), place in zip(items, places):
            if not torch.isfinite(torch.tensor(float(weight))) or not place.std > 0:
                raise ValueError(
                    "Weighted needs finite weights and scales with std above 0; got "
                    f"{weight!r} and {place}."
                )
        loaded = [load(r) if isinstance(r, str) else r for r, _ in items]
        self.parts: list[tuple[float, Reward]] = [
            (float(weight), Scaled(reward, place))
            for reward, (_, weight), place in zip(loaded, items, places)
        ]
        self.differentiable = all(r.differentiable for r in loaded)
        self.least = max(getattr(r, "least", 1) for r in loaded)
        self.name = "+".join(f"{weight:g} {part.name}" for weight, part in self._named())

    @classmethod
    def measured(
        cls,
        rewards: Mapping[str | Reward, float] | Sequence[tuple[str | Reward, float]],
        images: Tensor,
        prompts: Sequence[str],
    ) -> Weighted:
        """The sum of z-scores, their scales measured on ``images`` [N, 3, H, W] of the model that
        will be optimised; take at least 32. Raises: ValueError where a reward gives one score to
        all of them."""
        items = list(rewards.items()) if isinstance(rewards, Mapping) else list(rewards)
        loaded = [(load(r) if isinstance(r, str) else r, weight) for r, weight in items]
        with torch.no_grad():
            scales = [Scale.of(reward(images, prompts)) for reward, _ in loaded]
        return cls(loaded, scales)

    def _named(self) -> list[tuple[float, Scaled]]:
        return [(weight, part) for weight, part in self.parts if isinstance(part, Scaled)]

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        super().check(images[:, 0] if images.ndim == 5 else images, prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = [weight * part(images, prompts) for weight, part in self.parts]
        return torch.stack(scores).sum(0)

    def of_videos(self, change: Callable[[Reward], Reward]) -> Weighted:
        """The same sum of what ``change`` makes of each reward."""
        pairs = [(change(part.reward), weight) for weight, part in self._named()]
        return Weighted(pairs, [part.scale for _, part in self._named()])


def load_sum(text: str) -> Reward:
    """A reward by its text: ``"emoji-clip"``, or a weighted sum such as ``"2*emoji-clip+flicker"``.

    Raises: ValueError as ``load`` does, and for a weight of 0.
    """
    items = [TERM.fullmatch(item.strip()) for item in text.split("+")]
    terms = [match for match in items if match is not None]
    # a plus sign may also stand in the path of an option
    if len(terms) < len(items) or (len(terms) == 1 and terms[0]["weight"] is None):
        return load(text)
    weights = [float(term["weight"] or 1.0) for term in terms]
    if 0.0 in weights:
        raise ValueError(f"The reward {text!r} has a part of weight 0; leave the part out.")
    return Weighted([(load(term["reward"]), weight) for term, weight in zip(terms, weights)])


def parts_of(reward: Reward, prompt: str) -> list[tuple[float, Reward]]:
    """The parts of a reward with their weights for this prompt, or the reward as one part.

    A reward that has parts lists them as (weight, reward) in ``parts``, or gives the list for a
    prompt by ``parts_of(prompt)``.
    """
    choice = getattr(reward, "parts_of", None)
    weighted: list[tuple[float, Reward]] | None = (
        choice(prompt) if choice is not None else getattr(reward, "parts", None)
    )
    return list(weighted) if weighted else [(1.0, reward)]


class ReNOSet(Weighted):
    """ReNO's four rewards with their published weights, for general preference.

    5 HPSv2.1 + ImageReward + .05 PickScore + .01 CLIPScore. Two of them are the weakest on
    composition. Paper: Eyring et al. 2024, arXiv:2406.04312. 5 GB of weights in 16 bits.
    """

    differentiable = True
    facts = Facts(
        "those of its parts",
        "those of its parts",
        "3.4 B, image sides 2.3 B",
        "4.8 GB + 0.4",
        "general preference",
    )

    def __init__(self) -> None:
        super().__init__({"hps-v2-1": 5.0, "image-reward": 1.0, "pick-score": 0.05, "clip": 0.01})


class Scaled(BaseReward):
    """A reward in standard deviations of its own."""

    def __init__(self, reward: Reward, scale: Scale) -> None:
        self.reward, self.scale = reward, scale
        self.differentiable = reward.differentiable
        self.name = getattr(reward, "name", type(reward).__name__)
        self.least = getattr(reward, "least", 1)

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        super().check(images[:, 0] if images.ndim == 5 else images, prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.reward(images, prompts) - self.scale.mean) / self.scale.std

    def at(self, stage: Stage) -> BaseReward:
        if not isinstance(self.reward, BaseReward):
            return self
        return Scaled(self.reward.at(stage), self.scale)
