"""What branching searches share: planning within a budget, other outcomes of a step."""

import pytest
import torch

from diffalign.core import BudgetExceeded, UnsupportedModel
from diffalign.search.branching import advance, affordable, finish, outcomes, ranked


@pytest.mark.parametrize("survivors", [0, 1, 3])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 4), (5, 8), (2, 10)])
def test_affordable_is_the_largest_number_that_leaves_room_for_the_survivors(
    plane, survivors, first, last
):
    for nfe in range(1, 60):
        problem = plane(10, nfe=nfe, reserve=0)
        price, rest = last - first, 10 - last
        expected = max(
            (n for n in range(8) if n * price + min(n, survivors) * rest <= nfe), default=0
        )
        # the survivors' rest is rounded up to whole segments: never more, at most one less
        assert expected - 1 <= affordable(problem, 7, first, last, survivors) <= expected


def test_affordable_counts_scores(plane):
    problem = plane(10, rewards=7)
    assert affordable(problem, 9, 0, 2, survivors=3) == 4
    assert affordable(problem, 9, 0, 10) == 7


def test_affordable_keeps_the_final_call(plane):
    assert affordable(plane(10, nfe=29, reserve=1), 5, 0, 10) == 1


def test_survivors_may_go_on_from_before_the_scores(plane):
    problem = plane(10, nfe=20)
    # 4 rows to be scored and 8 to be finished from evaluation 2
    assert affordable(problem, 9, 0, 4, survivors=1, resume=2) == 3


def test_outcomes_are_those_of_new_seeds_before_the_step(plane):
    problem = plane(10)
    before = problem.run(problem.start([1, 2]), 3)
    after = problem.run(before, 4)
    rows, seeds = [0, 0, 1], [7, 8, 9]
    expected = problem.run(before.select(rows).reseed(seeds), 4)
    rowcount = problem.meter.rows
    free = outcomes(problem, after, None, rows, seeds)
    assert problem.meter.rows == rowcount
    assert torch.equal(free.latents, expected.latents)
    # and so is everything that follows
    assert torch.equal(problem.run(free).latents, problem.run(expected).latents)
    again = outcomes(problem, after, before, rows, seeds)
    assert torch.equal(again.latents, expected.latents)


def test_advance_keeps_the_states_before_where_the_kernel_is_silent(plane, monkeypatch):
    problem = plane(10)
    start = problem.start([1, 2])
    states, before = advance(problem, start, 4)
    assert before is None
    monkeypatch.setattr(type(problem.sampler), "std", silent)
    cut, before = advance(problem, start, 4)
    assert before.step == 3
    assert torch.equal(cut.latents, states.latents)
    assert advance(problem, start, 1)[1] is start


def silent(sampler, step):
    raise UnsupportedModel("this kernel does not say")


def test_finish_runs_as_many_as_the_budget_lets(plane):
    problem = plane(10, nfe=25)
    states = problem.run(problem.start([1, 2, 3]), 2)  # 6 of 25 rows
    lineages = [None, None, None]
    assert len(finish(problem, states, lineages)) == 2
    with pytest.raises(BudgetExceeded):
        finish(problem, states, lineages)


def test_ranked_is_stable():
    assert ranked([1.0, 3.0, 2.0, 3.0], 3) == [1, 3, 2]
