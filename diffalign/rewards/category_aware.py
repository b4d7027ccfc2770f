"""Rewards weighted by the category of the prompt, as in CARINOX (Kasaei et al. 2025,
arXiv:2509.17458)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffalign.core import Reward
from diffalign.core.errors import listed
from diffalign.rewards.base import BaseReward, Facts, load

PARTS = ("hps-v2-1", "image-reward", "da-score", "vqa-score")
"""The rewards of the published weights."""

WEIGHTS: dict[str, tuple[float, ...]] = {
    "color": (0.40, 1.06, 1.41, 1.14),
    "shape": (0.95, 1.12, 1.00, 0.92),
    "texture": (0.90, 1.10, 1.07, 0.93),
    "2d_spatial": (1.06, 1.02, 0.82, 1.10),
    "3d_spatial": (0.96, 0.92, 0.68, 1.43),
    "non_spatial": (1.01, 0.96, 0.85, 1.17),
    "numeracy": (1.02, 1.05, 1.00, 0.93),
    "complex": (0.67, 1.05, 1.21, 1.06),
    "overall": (0.59, 0.94, 1.12, 1.34),
    "none": (1.0, 1.0, 1.0, 1.0),
}
"""Category -> weight of each of ``PARTS``: the table that CARINOX's code ships
(``assets/weights.json``, MIT licence)."""

WORDS: dict[str, str] = {
    "color": "red orange yellow green blue purple pink brown black white gray grey golden beige",
    "shape": "round square triangular rectangular oval circular cubic spherical conical pyramidal "
    "cylindrical oblong diamond tall short big small large tiny long",
    "texture": "wooden metallic metal glass fabric leather plastic rubber fluffy furry woolen "
    "ceramic stone",
    "numeracy": "two three four five six seven eight nine ten",
    "2d_spatial": "left|right|above|below|next to|near|on top of|on the bottom of|on side of",
    "3d_spatial": "in front of|behind|hidden by",
    "non_spatial": "holding wearing riding looking watching eating drinking playing sitting "
    "standing walking running talking reading writing cooking painting pushing",
}
RULES = {
    category: re.compile(rf"\b(?:{words if '|' in words else '|'.join(words.split())})\b")
    for category, words in WORDS.items()
}


def categories_of(prompt: str) -> dict[str, float]:
    """Category -> probability by the words of the prompt: equal for one or two categories,
    "complex" for more, "none" where no word tells. Ours, not CARINOX's table of guesses."""
    text = prompt.lower()
    matches = [category for category, rule in RULES.items() if rule.search(text)]
    if not matches:
        return {"none": 1.0}
    return {"complex": 1.0} if len(matches) > 2 else {name: 1 / len(matches) for name in matches}


def weights_from_correlations(correlations: Sequence[float]) -> tuple[float, ...]:
    """``n rho_i / sum(rho)``: weights of n rewards from how they correlate with people; a negative
    correlation counts as none. All equal where none is positive."""
    useful = [max(0.0, rho) for rho in correlations]
    total = sum(useful)
    return tuple(len(useful) * rho / total if total > 0 else 1.0 for rho in useful)


def weights_from_ratings(
    scores: Mapping[str, Tensor], ratings: Tensor, categories: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """Weights by category from your own ratings: ``scores`` [N] of each reward on N images,
    ``ratings`` [N] by people or a judge, and the category of each image.

    The rule is CARINOX's: Pearson's correlation, normalised to the number of rewards.
    Raises: ValueError for other lengths, or a category with fewer than three images.
    """
    if any(len(score) != len(ratings) for score in scores.values()) or len(categories) != len(
        ratings
    ):
        raise ValueError(
            "weights_from_ratings needs one score of each reward, one rating and one category per "
            f"image; got {[len(score) for score in scores.values()]} scores, {len(ratings)} "
            f"ratings and {len(categories)} categories."
        )
    table = {}
    for category in sorted(set(categories)):
        rows = [i for i, name in enumerate(categories) if name == category]
        if len(rows) < 3:
            raise ValueError(
                f"weights_from_ratings: the category {category!r} has {len(rows)} images; a "
                "correlation needs at least 3."
            )
        table[category] = weights_from_correlations(
            [pearson(score[rows], ratings[rows]) for score in scores.values()]
        )
    return table


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two lists; 0 where one of them is constant."""
    x, y = (values.double() - values.double().mean() for values in (a, b))
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0


Categories = Callable[[str], Mapping[str, float]]


class CategoryAware(BaseReward):
    """Weighs several rewards by how well each agrees with people on the prompt's kind of content:
    ``sum_i lambda_i(prompt) unit_i(image)``.

    ``rewards``: names or objects, CARINOX's four by default. ``weights``: category -> one weight
    per reward, the published table by default; ``weights_from_ratings`` makes one from your own
    ratings. ``categories``: prompt -> {category: probability}; by default a rule on its words.
    The weights of a prompt are the mean of its categories' weights.
    Paper: Kasaei et al. 2025, arXiv:2509.17458.
    Cost: the sum of the parts'. Raises: ValueError for rows of another length, and at a prompt
    whose category has no row.
    """

    differentiable = True
    facts = Facts(
        "those of its parts",
        "those of its parts",
        "3.9 B",
        "7.3 GB + 2",
        "composition: what each part is best at",
    )

    def __init__(
        self,
        rewards: Sequence[str | Reward] = PARTS,
        weights: Mapping[str, Sequence[float]] = WEIGHTS,
        categories: Categories = categories_of,
    ) -> None:
        for category, row in weights.items():
            if len(row) != len(rewards):
                raise ValueError(
                    f"CategoryAware(weights=...) needs one weight for each of {len(rewards)} "
                    f"rewards; {category!r} has {len(row)}."
                )
        self.rewards = [load(r) if isinstance(r, str) else r for r in rewards]
        self.weights, self.categories = dict(weights), categories
        self.differentiable = all(reward.differentiable for reward in self.rewards)
        self.span = (0.0, float(len(self.rewards)))
        names = (getattr(r, "name", type(r).__name__) for r in self.rewards)
        self.name = f"category-aware({','.join(names)})"

    def weights_for(self, prompt: str) -> tuple[float, ...]:
        """The weight of each reward for this prompt."""
        guess = self.categories(prompt)
        for category in guess:
            if category not in self.weights:
                raise ValueError(
                    f"{self.name}: the prompt {prompt!r} is of category {category!r}; expected "
                    f"one of {listed(self.weights)}."
                )
        rows = [[share * w for w in self.weights[category]] for category, share in guess.items()]
        return tuple(map(sum, zip(*rows)))

    def parts_of(self, prompt: str) -> list[tuple[float, Reward]]:
        """The weighted sum for one prompt: weight and reward on the unit scale of each part, for
        methods that treat parts apart."""
        return list(zip(self.weights_for(prompt), map(Unit, self.rewards)))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        units = torch.stack([Unit(reward)(images, prompts) for reward in self.rewards])
        weights = {prompt: self.weights_for(prompt) for prompt in prompts}
        table = units.new_tensor([weights[prompt] for prompt in prompts])
        return (units * table.T).sum(0)


class Unit(BaseReward):
    """A reward on its unit scale; a function without one stays as it is."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.differentiable = reward.differentiable
        self.name = getattr(reward, "name", type(reward).__name__)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = self.reward(images, prompts)
        return self.reward.unit(scores) if isinstance(self.reward, BaseReward) else scores
