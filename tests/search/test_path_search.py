"""Search over paths: its cost by formula, noise that goes back, budgets."""

import math

import pytest
import torch

from diffalign.search import PathSearch
from diffalign.testing.search import replay, solve


def evaluations(method, count):
    """The cost of a search as its documentation has it, summed round by round."""
    total, at = method.paths * method.first(count), method.first(count)
    rounds = 0
    while at < count:
        low, last = at - method.forward, min(at - method.forward + method.backward, count)
        total += method.paths * method.children * (last - low)
        at, rounds = last, rounds + 1
    assert rounds == math.ceil((count - method.first(count)) / (method.backward - method.forward))
    return total, rounds


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (10, {}),
        (12, {"paths": 3, "children": 2, "begin": 0.5, "forward": 1, "backward": 2}),
        (9, {"paths": 1, "children": 5, "begin": 0.0, "forward": 4, "backward": 9}),
        (6, {"begin": 1.0, "forward": 3, "backward": 4}),
    ],
)
def test_cost(plane, steps, options, eta):
    problem = plane(steps, eta)
    method = PathSearch(searches=2, **options)
    solve(problem, method)
    rows, rounds = evaluations(method, steps)
    assert problem.meter.rows == 2 * rows
    images = 2 * rounds * method.paths * method.children
    assert problem.meter.rewards == problem.meter.decodes == images


@pytest.mark.parametrize(("forward", "backward"), [(2, 2), (3, 2)])
def test_steps_forth_must_be_more_than_steps_back(forward, backward):
    with pytest.raises(ValueError, match=r"backward=.* must be above forward"):
        PathSearch(forward=forward, backward=backward)


def test_a_short_trajectory_is_refused(plane):
    assert "this run has 2" in PathSearch(forward=2).refuses(plane(2))
    assert PathSearch(forward=2).refuses(plane(3)) is None


def test_a_round_keeps_the_best_of_all_children(plane):
    problem = plane(10, eta=0.0)
    method = PathSearch(paths=3, children=4, searches=1)
    state = method.step(problem, method.init(problem))[0]
    after, info = method.step(problem, state)
    # the states that stay are the children with the highest previews, best first
    scores = problem.preview(after.states).tolist()
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == info.values["highest"]
    for lineage in after.lineages:
        (move,) = lineage.moves[1:]
        assert (move.step, move.back) == (state.states.step, state.states.step - method.forward)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_result_follows_from_its_moves(plane, eta):
    problem = plane(10, eta)
    solve(problem, PathSearch(searches=1))
    lineage = problem.best.lineage
    assert lineage.seed is None
    score = float(problem.reward.function(replay(problem, lineage)[None]))
    assert score == pytest.approx(problem.best.score)


def test_equal_seeds_give_equal_runs(plane):
    best = []
    for seed in (3, 3, 4):
        problem = plane(seed=seed)
        solve(problem, PathSearch(searches=2))
        best.append(problem.best.score)
    assert best[0] == best[1] != best[2]


@pytest.mark.parametrize("nfe", [10, 17, 31, 60, 111, 230])
def test_budgets_are_kept_and_every_search_ends_with_an_image(plane, nfe):
    problem = plane(nfe=nfe, eta=0.0)
    solve(problem, PathSearch())
    assert problem.meter.rows <= nfe
    assert problem.best is not None
    # what is left would not have been one image more
    assert nfe - problem.meter.rows < 10


def test_it_finds_more_than_its_start(plane):
    """Mean over 20 seeds, paired: the best of a search against its first image."""
    gains = []
    for seed in range(20):
        problem = plane(seed=seed, eta=0.0)
        solve(problem, PathSearch(searches=1))
        plain = plane(seed=seed, eta=0.0)
        first = plain.finish(plain.run(plain.start(plain.seeds(1))), [None])[0].score
        gains.append(problem.best.score - first)
    gains = torch.tensor(gains)
    assert gains.mean() > 3 * gains.std() / math.sqrt(len(gains))
