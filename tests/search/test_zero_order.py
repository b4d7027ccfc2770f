"""Zero-order search: neighbours by formula, a pivot that never gets worse, an explicit restart."""

import math

import pytest
import torch

from diffalign.search import BestOfN, ZeroOrder
from diffalign.testing.search import replay, solve

# the search that was published does without noise in the steps
ODE = {"eta": 0.0}


def test_cosine_form_keeps_norm_and_cosine():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=rng)
    for similarity in (0.0, 0.5, 0.95):
        method = ZeroOrder(form="cosine", similarity=similarity)
        rows = method.neighbourhood(noise, 5, rng).flatten(1).double()
        pivot = noise.flatten(1).double()
        assert rows.norm(dim=1) == pytest.approx([float(pivot.norm())] * 5, rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(rows, pivot)
        assert cosine.tolist() == pytest.approx([similarity] * 5, abs=1e-4)
        assert len({tuple(row.tolist()) for row in rows}) == 5


def test_pcn_form_is_normal_noise_with_that_correlation():
    """Variance 1 and covariance ``similarity`` with the pivot, over 2^16 values: 5 standard
    errors."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 256, 256, generator=rng)
    row = ZeroOrder(similarity=0.8).neighbourhood(noise, 1, rng).flatten().double()
    pivot, count = noise.flatten().double(), noise.numel()
    assert abs(float((row * row).mean()) - 1.0) < 5 * math.sqrt(2 / count)
    # Var(x y) = 1 + c^2 for correlation c
    assert abs(float((row * pivot).mean()) - 0.8) < 5 * math.sqrt(1.64 / count)


def test_neighbours_have_the_type_of_the_noise():
    noise = torch.zeros(1, 3, dtype=torch.bfloat16)
    rows = ZeroOrder().neighbourhood(noise, 2, torch.Generator().manual_seed(0))
    assert (rows.dtype, rows.shape) == (torch.bfloat16, (2, 3))


def test_the_pivot_never_gets_worse_and_is_the_best_image(plane):
    problem = plane(**ODE)
    method = ZeroOrder(patience=None, rounds=12)
    state, pivots = method.init(problem), []
    while not method.finished(state):
        state, _ = method.step(problem, state)
        pivots.append(state.score)
    assert pivots == sorted(pivots)
    assert pivots[-1] == problem.best.score > pivots[0]


@pytest.mark.parametrize("patience", [1, 3])
def test_a_fresh_start_follows_after_rounds_without_a_better_neighbour(plane, counting, patience):
    """No neighbour is ever better: each start lasts ``patience`` rounds."""
    problem = plane(function=counting(lambda number: -number), **ODE)
    _, infos = solve(problem, ZeroOrder(neighbours=2, patience=patience, rounds=6))
    starts = 6 // patience
    expected = (["fresh start"] + ["no better neighbour"] * (patience - 1)) * starts
    texts = [info.text for info in infos if info.text != "no better neighbour, fresh start"]
    assert texts == expected
    assert problem.meter.rows == 10 * (starts + 6 * 2)


def test_no_patience_is_no_restart(plane, counting):
    problem = plane(function=counting(lambda number: -number), **ODE)
    _, infos = solve(problem, ZeroOrder(patience=None, rounds=5))
    assert [info.text for info in infos].count("fresh start") == 1


def test_cost_and_replay(plane):
    problem = plane(**ODE)
    solve(problem, ZeroOrder(neighbours=3, rounds=4, patience=None))
    assert problem.meter.rows == 10 * (1 + 3 * 4)
    assert problem.meter.rewards == problem.meter.decodes == 1 + 3 * 4
    lineage = problem.best.lineage
    assert lineage.noise is not None
    assert lineage.seed is None
    point = replay(problem, lineage)
    assert float(problem.reward.function(point[None])) == pytest.approx(problem.best.score)


def test_the_first_image_is_the_first_of_best_of_n(plane):
    problem, other = plane(**ODE), plane(**ODE)
    solve(problem, ZeroOrder(rounds=1), rounds=1)
    solve(other, BestOfN(1))
    assert torch.equal(problem.best.image, other.best.image)
    assert problem.best.lineage.seed == other.best.lineage.seed


def test_equal_seeds_give_equal_runs(plane):
    best = [solve_best(plane(seed=seed, **ODE)) for seed in (3, 3, 4)]
    assert best[0] == best[1] != best[2]


def solve_best(problem):
    solve(problem, ZeroOrder(rounds=5))
    return problem.best.score


@pytest.mark.parametrize("nfe", [10, 25, 49, 50, 90])
def test_budgets_are_kept(plane, nfe):
    problem = plane(nfe=nfe, **ODE)
    solve(problem, ZeroOrder())
    assert problem.meter.rows == nfe // 10 * 10


def test_a_sampler_that_draws_noise_is_refused(plane):
    assert "deterministic" in ZeroOrder().refuses(plane(eta=1.0))
    assert ZeroOrder().refuses(plane(**ODE)) is None


def test_without_the_refusal_neighbours_would_mean_nothing(plane):
    """Under a kernel of full noise with its own seeds, a neighbour is as far as a stranger."""
    rng = torch.Generator().manual_seed(0)
    distance = {}
    for eta in (0.0, 1.0):
        problem = plane(40, eta=eta)
        noise = torch.randn(1, 2, generator=rng, dtype=torch.float64)
        near = ZeroOrder(similarity=0.999).neighbourhood(noise, 50, rng)
        ends = problem.run(problem.start(range(50), near)).latents
        distance[eta] = float((ends - ends[:1]).norm(dim=1).median())
    assert distance[0.0] < 0.2 < 0.5 < distance[1.0]
