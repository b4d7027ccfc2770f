"""Rollover budget forcing: its budget identities, its target, what it returns."""

import math

import pytest
import torch

from diffalign.core import UnsupportedModel
from diffalign.search import RBF, Beam
from diffalign.testing.search import replay, solve


def trace(problem, method):
    """States and infos of one search."""
    state, states, infos = method.init(problem), [], []
    while not method.finished(state):
        state, info = method.step(problem, state)
        states.append(state)
        infos.append(info)
    return states, infos


REWARDS = {
    "accepts always": lambda number: number,
    "accepts never": lambda number: -number,
    "accepts every third": lambda number: number if number % 3 == 0 else -1e9,
    "all are equal": lambda number: 0.0,
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(REWARDS))
def test_every_reward_spends_the_same(plane, counting, name, batch):
    """starts + quota (T - 1) evaluations and scores, whatever is accepted."""
    problem = plane(8, function=counting(REWARDS[name]))
    solve(problem, RBF(starts=5, quota=4, batch=batch, searches=1))
    assert problem.meter.rows == problem.meter.rewards == 5 + 4 * 7
    assert problem.best is not None


def test_tries_roll_over_when_all_are_accepted(plane, counting):
    """One try a step; the last step has all the others: by hand for T = 5 and a quota of 3."""
    problem = plane(5, function=counting(REWARDS["accepts always"]))
    states, infos = trace(problem, RBF(starts=2, quota=3, searches=1))
    assert [state.allowed for state in states[:4]] == [3, 5, 7, 9]
    assert len(infos) == 1 + 3 + 9
    assert [info.text for info in infos].count("finished") == 9


def test_nothing_rolls_over_when_none_is_accepted(plane, counting):
    problem = plane(5, function=counting(REWARDS["accepts never"]))
    states, infos = trace(problem, RBF(starts=2, quota=3, searches=1))
    assert {state.allowed for state in states[:-1]} == {3}
    assert len(infos) == 1 + 3 * 4


def test_the_target_rises_with_every_accepted_child_and_never_falls(plane):
    problem = plane(10)
    states, _ = trace(problem, RBF(starts=6, quota=6, searches=1))
    targets = [state.target for state in states if state.path is not None]
    assert targets == sorted(targets)
    assert targets[-1] > targets[0]


def test_the_best_of_a_step_is_taken_where_none_beats_the_target(plane):
    """Scores by number: starts 9, 8; then the tries 1, 3, 2 of the first step."""
    values = [9.0, 8.0, 1.0, 3.0, 2.0] + [0.0] * 99
    from_list = plane(4, function=Listed(values))
    method = RBF(starts=2, quota=3)
    state = method.init(from_list)
    for _ in range(4):
        before, (state, _) = state, method.step(from_list, state)
    # the second try is on its way, the target is the start's
    assert (state.target, state.path.state.step) == (9.0, 2)
    assert before.child.lineage == state.path.lineage
    assert before.score == 3.0


class Listed:
    """The n-th score is the n-th of a list."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, points):
        return torch.tensor([next(self.values) for _ in points], dtype=torch.float64)


def test_the_result_is_the_best_finished_image(plane, counting):
    """Previews are worth more than every image, and the last image least of all."""
    problem = plane(6, function=counting(REWARDS["accepts never"]))
    solve(problem, RBF(starts=3, quota=4, searches=1))
    # 3 + 4 x 4 previews come before, then four images
    assert problem.best.score == -(3 + 16)


def test_one_start_and_one_try_is_the_plain_sampler(plane):
    problem, plain = plane(10), plane(10)
    solve(problem, RBF(starts=1, quota=1, searches=1))
    image = plain.finish(plain.run(plain.start(plain.seeds(1))), [None])[0].image
    assert torch.equal(problem.best.image, image)
    assert problem.best.lineage.seed is not None
    assert problem.meter.rows == 10


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(plane, steps):
    problem = plane(steps)
    solve(problem, RBF(starts=3, quota=2, searches=1))
    assert problem.meter.rows == 3 + 2 * (steps - 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_result_follows_from_its_moves(plane, batch):
    problem = plane(8)
    solve(problem, RBF(starts=4, quota=5, batch=batch, searches=1))
    lineage = problem.best.lineage
    # the start noise, then at most one new draw for each step
    steps = [move.step for move in lineage.moves[1:]]
    assert steps == sorted(set(steps))
    score = float(problem.reward.function(replay(problem, lineage)[None]))
    assert score == pytest.approx(problem.best.score)


def test_a_silent_kernel_gives_the_same_search_for_more(plane, monkeypatch):
    problem, other = plane(6), plane(6)
    method = RBF(starts=3, quota=4, searches=1)
    solve(problem, method)
    monkeypatch.setattr(type(problem.sampler), "std", silent)
    solve(other, method)
    assert torch.equal(other.best.image, problem.best.image)
    assert problem.meter.rows < other.meter.rows <= 3 + 2 * 4 * 5


def silent(sampler, step):
    raise UnsupportedModel("this kernel does not say")


@pytest.mark.parametrize("name", list(REWARDS))
@pytest.mark.parametrize("nfe", [8, 9, 20, 61, 150])
def test_budgets_are_kept_for_every_reward(plane, counting, name, nfe):
    problem = plane(8, function=counting(REWARDS[name]), nfe=nfe)
    solve(problem, RBF(starts=5, quota=4))
    assert problem.best is not None
    assert nfe - 8 < problem.meter.rows <= nfe


def test_a_small_budget_is_shared_equally(plane, counting):
    """5 starts, and 30 of 35 evaluations for 7 steps: 4 tries each and 2 more for the first."""
    problem = plane(8, function=counting(REWARDS["accepts never"]), nfe=35)
    method = RBF(starts=5, quota=22)
    state, _ = method.step(problem, method.init(problem))
    assert (state.quota, state.allowed) == (4, 6)
    solve(problem, method)
    assert problem.meter.rows == 35


def test_equal_seeds_give_equal_runs(plane):
    best = []
    for seed in (3, 3, 4):
        problem = plane(seed=seed)
        solve(problem, RBF(starts=4, quota=3, searches=2))
        best.append(problem.best.score)
    assert best[0] == best[1] != best[2]


@pytest.mark.slow
def test_it_is_better_than_the_plain_sampler_at_equal_cost(plane):
    """Mean over 30 seeds, paired, against a beam of the same cost: no worse than 3 standard
    errors; and the gain over one image is above 3."""
    gains, differences = [], []
    for seed in range(30):
        problem, beam, plain = (plane(seed=seed) for _ in range(3))
        solve(problem, RBF(starts=4, quota=4, searches=1))
        solve(beam, Beam(preset="svdd", children=4, searches=1))
        assert problem.meter.rows == beam.meter.rows
        first = plain.finish(plain.run(plain.start(plain.seeds(1))), [None])[0].score
        gains.append(problem.best.score - first)
        differences.append(problem.best.score - beam.best.score)
    for values, bound in ((gains, 3.0), (differences, -3.0)):
        t = torch.tensor(values)
        assert float(t.mean()) > bound * float(t.std()) / math.sqrt(len(values))


def test_children_of_a_deterministic_sampler_are_no_children(plane):
    assert RBF.branches
    with pytest.raises(ValueError, match="draws no noise"):
        solve(plane(10, eta=0.0), RBF(starts=2, quota=2, searches=1))
