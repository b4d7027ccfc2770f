"""Ranks against scipy's, ties by hand, and what a mixture must not depend on."""

import pytest
import torch
from scipy.stats import rankdata

from diffalign.search.ranks import mixed_ranks, ranks

RNG = torch.Generator().manual_seed(5)


def test_ranks_are_those_of_scipy():
    scores = torch.randint(0, 6, (4, 9), generator=RNG).double()
    expected = rankdata(scores.numpy(), axis=1)
    assert ranks(scores).tolist() == expected.tolist()


def test_ties_share_the_mean_of_their_places():
    assert ranks(torch.tensor([2.0, 7.0, 7.0, 7.0, 1.0])).tolist() == [2.0, 4.0, 4.0, 4.0, 1.0]


def test_a_mixture_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    # ranks 1 3 2 and 3 1 2, weights 2 and 1, two rewards
    assert mixed_ranks(scores, (2.0, 1.0)).tolist() == pytest.approx([2.5, 3.5, 3.0])
    assert mixed_ranks(scores, (2.0, 0.0)).tolist() == pytest.approx([2.0, 6.0, 4.0])


@pytest.mark.parametrize("function", [torch.exp, torch.atan, lambda s: 1e6 * s - 3, lambda s: s**3])
def test_an_increasing_function_of_a_reward_changes_nothing(function):
    scores = torch.randn(3, 12, generator=RNG, dtype=torch.float64)
    other = torch.stack([function(scores[0]), scores[1], scores[2]])
    assert torch.equal(mixed_ranks(scores, (1, 2, 3)), mixed_ranks(other, (1, 2, 3)))
