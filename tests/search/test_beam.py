"""Beams: what they reduce to, their cost, their choice, their schedule, budgets."""

import math

import pytest
import torch

from diffalign.core import UnsupportedModel
from diffalign.search import Beam, BestOfN
from diffalign.search.beam import PRESETS, Layout, choice
from diffalign.testing.search import replay, solve


def scores_of(problem, count):
    images = problem.run(problem.start(problem.seeds(count)))
    return [c.score for c in problem.finish(images, [None] * count)]


@pytest.mark.parametrize("every", [1, 3, 10])
def test_one_child_is_the_plain_sampler(plane, every):
    problem, plain = plane(10), plane(10)
    solve(problem, Beam(beams=3, children=1, every=every, searches=1))
    assert problem.best.score == max(scores_of(plain, 3))
    assert problem.best.lineage.seed is not None
    assert problem.meter.rows == plain.meter.rows
    # nothing competes, so nothing is scored but the images
    assert problem.meter.rewards == 3


@pytest.mark.parametrize("every", [10, 99])
def test_one_block_is_best_of_n(plane, every):
    problem, plain = plane(10), plane(10)
    solve(problem, Beam(beams=2, children=4, every=every, searches=1))
    solve(plain, BestOfN(8, batch=8))
    assert torch.equal(problem.best.image, plain.best.image)
    assert problem.best.lineage == plain.best.lineage
    assert (problem.meter.rows, problem.meter.rewards) == (80, 8)


@pytest.mark.parametrize(
    ("options", "steps", "rows", "scores"),
    [
        # beams x children x T; a score for each of them at each of the ceil(T / every) choices
        ({"beams": 2, "children": 4, "every": 2}, 10, 80, 40),
        ({"beams": 2, "children": 4, "every": 3}, 10, 80, 32),
        ({"preset": "svdd"}, 6, 20 * 6, 20 * 6),
        ({"preset": "svdd", "beams": 3, "children": 2}, 6, 6 * 6, 6 * 6),
        ({"preset": "code"}, 6, 25 * 6, 25 * 3),
        # choices after 2, 4, 6, 8 of 10 evaluations look 3, 3, 3, 2 further
        ({"beams": 1, "children": 2, "every": 2, "lookahead": 3}, 10, 20 + 2 * 11, 10),
    ],
)
def test_cost(plane, options, steps, rows, scores):
    problem = plane(steps)
    solve(problem, Beam(searches=1, **options))
    assert (problem.meter.rows, problem.meter.rewards) == (rows, scores)
    assert problem.meter.decodes == scores


def test_cost_where_the_kernel_is_silent(plane, monkeypatch):
    """Each further child costs one evaluation more, at each of three later choices."""
    problem, other = plane(8), plane(8)
    method = Beam(beams=2, children=3, every=2, searches=1)
    solve(problem, method)
    monkeypatch.setattr(type(problem.sampler), "std", silent)
    solve(other, method)
    assert other.meter.rows == problem.meter.rows + 2 * (3 - 1) * 3
    # and it is the same search
    assert torch.equal(other.best.image, problem.best.image)


def silent(sampler, step):
    raise UnsupportedModel("this kernel does not say")


def test_siblings_differ_and_the_first_child_is_the_image_itself(plane):
    problem = plane(10)
    method = Beam(beams=2, children=3, every=2)
    state, _ = method.step(problem, method.init(problem))
    round_ = method._expand(problem, state, 3)
    latents = round_.images.latents
    assert torch.equal(latents[:2], state.states.latents)
    assert len({tuple(row.tolist()) for row in latents}) == 6
    assert round_.groups == (0, 1, 0, 0, 1, 1)
    assert round_.lineages[:2] == state.lineages


def test_choice_of_the_best():
    scores = [1.0, 5.0, 3.0, 4.0]
    assert choice(scores, 2) == [1, 3]
    assert choice(scores, 2, groups=[0, 1, 0, 1]) == [2, 1]


@pytest.mark.slow
def test_choice_by_softmax_is_a_draw_by_exp_of_the_score():
    """Frequencies of single draws against the softmax, and of pairs against draws without
    replacement: 5 standard errors."""
    scores, temperature, count = [0.0, 0.5, 1.0], 0.7, 20000
    weights = [math.exp(score / temperature) for score in scores]
    p = [weight / sum(weights) for weight in weights]
    rng = torch.Generator().manual_seed(0)
    single, pairs = [0] * 3, 0
    for _ in range(count):
        (row,) = choice(scores, 1, draw=(temperature, rng))
        single[row] += 1
        pairs += choice(scores, 2, draw=(temperature, rng)) == [2, 0]
    for share, hits in zip(p, single, strict=True):
        assert abs(hits / count - share) < 5 * math.sqrt(share * (1 - share) / count)
    share = p[2] * p[0] / (1 - p[2])
    assert abs(pairs / count - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_softmax_takes_worse_images_too(plane):
    problem, top = plane(10), plane(10)
    solve(problem, Beam(select="softmax", temperature=1e9, searches=1))
    solve(top, Beam(select="softmax", temperature=1e-9, searches=1))
    other = plane(10)
    solve(other, Beam(searches=1))
    assert top.best.score == other.best.score
    assert problem.best.score != other.best.score


def test_groups_do_not_compete(plane):
    """Two beams of their own are two searches with one beam: each keeps one of its children."""
    problem = plane(10)
    method = Beam(beams=2, children=3, every=2, group="per_beam")
    state = method.init(problem)
    for _ in range(4):
        before = state
        state, _ = method.step(problem, state)
        assert len(state.lineages) == 2
        for i, lineage in enumerate(before.lineages):
            assert state.lineages[i].moves[: len(lineage.moves)] == lineage.moves
    # competing for the same places, one beam soon crowds the other out on some seed
    assert any(ancestors(plane(10, seed=seed)) == 1 for seed in range(10))


def ancestors(problem):
    method = Beam(beams=2, children=3, every=2)
    state = method.init(problem)
    for _ in range(4):
        state, _ = method.step(problem, state)
    return len({lineage.moves[0] for lineage in state.lineages})


def test_shrinking_beams_by_hand():
    """``max(N, int(5 N (1 / 5)^(i / (T - 1))))`` for N = 2 and T = 9."""
    layout = Layout(beams=2, shrink=5.0)
    assert [layout.width(i, 9) for i in range(10)] == [10, 8, 6, 5, 4, 3, 2, 2, 2, 2]


def test_dsearch_widens_as_it_narrows(plane):
    problem = plane(10)
    method = Beam(preset="dsearch", searches=1)
    state, widths, sizes = method.init(problem), [], []
    while not method.finished(state):
        rows = problem.meter.rewards
        state, _ = method.step(problem, state)
        sizes.append(problem.meter.rewards - rows)
        if state.states is not None:
            widths.append(len(state.lineages))
    layout = PRESETS["dsearch"]
    assert widths == [layout.width(i, 10) for i in range(1, 10)]
    # children are 5 of each beam, or 25 shared by all beams, never anything between
    beams = [5, *widths]
    for size, count in zip(sizes, beams, strict=True):
        assert size in (5 * count, count * round(5 * 5 / count))
    assert sizes[0] == 25
    # late choices nearly always widen: their probability is 1 - exp(-3 i / 9)
    assert sizes[-1] > 5


def test_options_replace_the_preset():
    assert Beam(preset="code", children=3).layout == Layout(1, 3, 2, "global")
    assert Beam().layout == PRESETS["beam"]


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_result_follows_from_its_moves(plane, preset, eta):
    problem = plane(6, eta)
    solve(problem, Beam(preset=preset, searches=1))
    score = float(problem.reward.function(replay(problem, problem.best.lineage)[None]))
    assert score == pytest.approx(problem.best.score)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("nfe", [6, 9, 23, 50, 151])
def test_budgets_are_kept_and_every_search_ends_with_an_image(plane, preset, nfe):
    problem = plane(6, nfe=nfe)
    solve(problem, Beam(preset=preset))
    assert problem.best is not None
    assert nfe - 6 < problem.meter.rows <= nfe


@pytest.mark.parametrize("rewards", [2, 9, 40])
def test_budgets_of_scores_are_kept(plane, rewards):
    problem = plane(6, rewards=rewards)
    solve(problem, Beam())
    assert problem.best is not None
    assert problem.meter.rewards <= rewards


def test_equal_seeds_give_equal_runs(plane):
    best = []
    for seed in (3, 3, 4):
        problem = plane(seed=seed)
        solve(problem, Beam(select="softmax", searches=2))
        best.append(problem.best.score)
    assert best[0] == best[1] != best[2]


def test_children_of_a_deterministic_sampler_are_no_children(plane):
    """It says that it needs a sampler that draws noise; without one no child can be drawn."""
    assert Beam.branches
    problem = plane(10, eta=0.0)
    with pytest.raises(ValueError, match="draws no noise"):
        solve(problem, Beam(searches=1))
