"""Rewards under control: checks, batches that fit, ties, and the expected best of n draws."""

from itertools import combinations

import pytest
import torch

from diffalign.alignment.scoring import KEPT, Fit, Ranking, Scorer, expected_best, name_of
from diffalign.core import Budget, BudgetExceeded, Candidate, Lineage, Meter, Move


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def candidate(score, level=0.0):
    return Candidate(score, torch.full((3, 2, 2), level), Lineage((Move(0, 1),)))


def test_scores_are_float64_and_counted():
    meter = Meter()
    scores = Scorer(brightness, "a dog", meter)(torch.full((5, 3, 4, 4), 0.25))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [0.25] * 5
    assert meter.rewards == 5


def test_a_reward_gets_one_prompt_for_each_image():
    sizes = []

    def reward(images, prompts):
        sizes.append((len(images), list(prompts)))
        return torch.zeros(len(images))

    Scorer(reward, "a dog", Meter(), Fit(2))(torch.zeros(3, 3, 4, 4))
    assert sizes == [(2, ["a dog"] * 2), (1, ["a dog"])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 1), r"one score per image, a tensor of shape \[2\]; got \[2, 1\]"),
        (torch.tensor([0.0, float("nan")]), "scores must be finite"),
        ([0.0, 1.0], "got list"),
    ],
)
def test_a_bad_reward_is_named(value, text):
    with pytest.raises(ValueError, match=text) as caught:
        Scorer(lambda images, prompts: value, "a dog", Meter())(torch.zeros(2, 3, 4, 4))
    assert "<lambda>" in str(caught.value)


def test_the_budget_stops_before_the_reward_is_asked():
    asked = []
    scorer = Scorer(lambda images, prompts: asked.append(1), "a dog", Meter(Budget(rewards=2)))
    with pytest.raises(BudgetExceeded):
        scorer(torch.zeros(3, 3, 4, 4))
    assert not asked


def test_out_of_memory_halves_the_batch_and_is_remembered():
    sizes = []

    def reward(images, prompts):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return images.mean((1, 2, 3))

    images = torch.arange(7.0)[:, None, None, None].expand(7, 3, 2, 2)
    scorer = Scorer(reward, "a dog", Meter(), Fit(8))
    assert scorer(images).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert scorer.fit.size == 2


def test_out_of_memory_for_one_image_is_the_users_to_see():
    def reward(images, prompts):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        Scorer(reward, "a dog", Meter())(torch.zeros(3, 3, 2, 2))


def test_the_ranking_keeps_the_best_in_order():
    ranking = Ranking()
    news = [ranking.add(candidate(score)) for score in (0.2, 0.5, 0.1, 0.5, 0.9)]
    assert news == [True, True, False, False, True]
    assert [c.score for c in ranking.top] == [0.9, 0.5, 0.5, 0.2, 0.1]
    assert ranking.first.score == 0.2
    assert ranking.scored == 5
    assert ranking.equal == 1
    for score in range(20):
        ranking.add(candidate(-score))
    assert len(ranking.top) == KEPT
    assert ranking.best.score == 0.9


def test_equal_scores_are_settled_by_the_next_reward():
    meter = Meter()
    ranking = Ranking((Scorer(brightness, "a dog", meter),))
    assert ranking.add(candidate(1.0, level=0.2))
    assert meter.rewards == 0  # nothing to settle yet
    assert ranking.add(candidate(1.0, level=0.6))
    assert not ranking.add(candidate(1.0, level=0.4))
    assert [round(c.others[0], 6) for c in ranking.top] == [0.6, 0.4, 0.2]
    assert ranking.equal == 3
    assert meter.rewards == 3


def test_without_a_next_reward_the_earlier_image_stays():
    ranking = Ranking()
    first, second = candidate(1.0, 0.1), candidate(1.0, 0.2)
    assert ranking.add(first)
    assert not ranking.add(second)
    assert ranking.best is first
    assert ranking.equal == 2


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(count):
    scores = [0.3, -1.0, 2.5, 0.3, 0.9]
    subsets = [max(subset) for subset in combinations(scores, count)]
    assert expected_best(scores, count) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_expected_best_of_more_draws_than_scores():
    with pytest.raises(ValueError, match=r"count must be in \[1, 2\]"):
        expected_best([1.0, 2.0], 3)


def test_names_of_rewards():
    class Named:
        name = "mine"

    assert name_of(brightness) == "brightness"
    assert name_of(Named()) == "mine"
    assert name_of(object()) == "object"
