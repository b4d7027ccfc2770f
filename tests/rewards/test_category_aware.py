"""Weights by category: the published table, the rule of correlations, categories by words."""

import pytest
import torch

from diffalign.rewards import (
    BaseReward,
    CategoryAware,
    HeldOut,
    weights_from_correlations,
    weights_from_ratings,
)
from diffalign.rewards.category_aware import PARTS, WEIGHTS, categories_of

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Channel(BaseReward):
    differentiable = True
    span = (-1.0, 3.0)

    def __init__(self, index):
        self.index, self.name = index, "rgb"[index]

    def score(self, images, prompts):
        return images[:, self.index].mean((1, 2))


def test_published_rows_sum_to_four():
    assert len(PARTS) == 4
    for row in WEIGHTS.values():
        # the table is rounded to two digits
        assert sum(row) == pytest.approx(4.0, abs=0.011)


def test_the_rule_is_close_to_the_table_where_the_card_says_so():
    """Colour and 2D positions of the study (Pearson; HPS v2.1, ImageReward, DA, VQAScore-XXL)."""
    for category, rho in (
        ("color", (0.24, 0.58, 0.79, 0.68)),
        ("2d_spatial", (0.43, 0.40, 0.32, 0.45)),
    ):
        assert weights_from_correlations(rho) == pytest.approx(WEIGHTS[category], abs=0.09)


def test_the_rule_by_hand():
    assert weights_from_correlations((0.1, 0.3)) == pytest.approx((0.5, 1.5))
    assert weights_from_correlations((0.2, -0.5, 0.6)) == pytest.approx((0.75, 0.0, 2.25))
    assert weights_from_correlations((-0.1, -0.2)) == (1.0, 1.0)


def test_weights_from_ratings_by_scipy():
    from scipy.stats import pearsonr

    rng = torch.Generator().manual_seed(6)
    ratings = torch.rand(12, generator=rng)
    scores = {
        "a": ratings + 0.5 * torch.rand(12, generator=rng),
        "b": torch.rand(12, generator=rng),
    }
    categories = ["color"] * 7 + ["shape"] * 5
    table = weights_from_ratings(scores, ratings, categories)
    for category, rows in (("color", slice(7)), ("shape", slice(7, 12))):
        rho = [max(0.0, pearsonr(s[rows], ratings[rows])[0]) for s in scores.values()]
        expected = [2 * value / sum(rho) for value in rho]
        assert table[category] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="'shape' has 2 images"):
        weights_from_ratings(scores, ratings, ["color"] * 10 + ["shape"] * 2)
    with pytest.raises(ValueError, match="one score of each reward"):
        weights_from_ratings(scores, ratings[:5], categories)


@pytest.mark.parametrize(
    ("prompt", "categories"),
    [
        ("a red car", {"color": 1.0}),
        ("two dogs", {"numeracy": 1.0}),
        ("a dog left of a cat", {"2d_spatial": 1.0}),
        ("a red dog behind a cat", {"color": 0.5, "3d_spatial": 0.5}),
        ("a round red wooden table", {"complex": 1.0}),
        ("a serene landscape", {"none": 1.0}),
        # part of a word is no word
        ("a bored monk", {"none": 1.0}),
    ],
)
def test_categories_by_words(prompt, categories):
    assert categories_of(prompt) == categories


def test_it_is_the_weighted_sum_of_units_of_each_prompt():
    table = {"color": (0.5, 1.5), "none": (1.0, 1.0)}
    reward = CategoryAware([Channel(0), Channel(1)], table)
    prompts = ["a red car", "a landscape", "a blue car"]
    units = [(IMAGES[:, i].mean((1, 2)) + 1) / 4 for i in (0, 1)]
    rows = torch.tensor([[0.5, 1.5], [1.0, 1.0], [0.5, 1.5]], dtype=torch.float64)
    expected = rows[:, 0] * units[0] + rows[:, 1] * units[1]
    assert torch.allclose(reward(IMAGES, prompts), expected)
    assert reward.name == "category-aware(r,g)"
    parts = reward.parts_of("a red car")
    assert [weight for weight, _ in parts] == [0.5, 1.5]
    total = sum(weight * part(IMAGES, prompts) for weight, part in parts)
    assert torch.allclose(total[[0, 2]], expected[[0, 2]])


def test_mixed_categories_mix_their_weights():
    guess = {"color": 0.25, "shape": 0.75}
    table = {"color": (0.0, 2.0), "shape": (1.0, 1.0)}
    reward = CategoryAware([Channel(0), Channel(1)], table, lambda prompt: guess)
    assert reward.weights_for("anything") == pytest.approx((0.75, 1.25))


def test_gradients_pass():
    images = IMAGES.clone().requires_grad_()
    reward = CategoryAware([Channel(0), Channel(2)], {"none": (1.0, 3.0)})
    assert reward.differentiable
    reward(images, ["x"] * 3).sum().backward()
    assert images.grad.sum((2, 3))[0].tolist() == pytest.approx([0.25, 0.0, 0.75])


def test_bad_tables():
    with pytest.raises(ValueError, match="one weight for each of 1 rewards; 'none' has 2"):
        CategoryAware([Channel(0)], {"none": (1.0, 2.0)})
    reward = CategoryAware([Channel(0)], {"shape": (1.0,)})
    with pytest.raises(ValueError, match="is of category 'color'; expected one of shape"):
        reward(IMAGES, ["a red car"] * 3)


def test_held_out_rewards_report_and_are_never_optimised():
    reward = HeldOut(Channel(1))
    assert torch.equal(reward(IMAGES, ["x"] * 3), IMAGES[:, 1].mean((1, 2)))
    assert (reward.name, reward.differentiable) == ("held-out(g)", False)
    with pytest.raises(ValueError, match="held out: no gradient"):
        reward(IMAGES.clone().requires_grad_(), ["x"] * 3)
    assert torch.allclose(reward.unit(torch.tensor([1.0])), torch.tensor([0.5]))


def test_align_refuses_a_reward_that_is_held_out():
    from diffalign.alignment.order import target_of

    with pytest.raises(ValueError, match="reported and never optimised"):
        target_of(HeldOut(Channel(0)))
    other = Channel(0)
    assert target_of(other) is other
