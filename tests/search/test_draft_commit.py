"""Drafts choose, full images are the result: what is run, kept back, refused and written."""

import pytest
import torch

from diffalign.core.registry import METHODS, written
from diffalign.search import Beam, BestOfN, DraftCommit, PathSearch, ZeroOrder
from diffalign.testing.search import solve

ODE = {"eta": 0.0}


def test_the_result_is_a_plain_image_of_its_seed(plane):
    problem, plain = plane(**ODE), plane(**ODE)
    solve(problem, DraftCommit(BestOfN(8), steps=4))
    best = problem.best
    image = plain.finish(plain.run(plain.start([best.lineage.seed])), [None])[0].image
    assert torch.equal(best.image, image)


def test_the_best_drafts_are_run_in_full(plane):
    problem, drafts = plane(**ODE), plane(4, **ODE)
    state, _ = solve(problem, DraftCommit(BestOfN(8), steps=4, commits=3))
    images = drafts.run(drafts.start(drafts.seeds(8)))
    scores = [c.score for c in drafts.finish(images, [None] * 8)]
    expected = sorted(scores, reverse=True)[:3]
    assert [draft.score for draft in state.best] == expected
    assert problem.meter.rows == 8 * 4 + 3 * 10
    assert problem.meter.rewards == problem.meter.decodes == 8 + 3


def test_half_of_the_evaluations_are_a_draft_where_nothing_is_set(plane):
    problem = plane(10, **ODE)
    solve(problem, DraftCommit(BestOfN(4), commits=1))
    assert problem.meter.rows == 4 * 5 + 10


def test_a_draft_is_no_result_but_shown_until_there_is_one(plane):
    problem = plane(**ODE)
    method = DraftCommit(BestOfN(4, batch=4), steps=4, commits=1)
    state, _ = method.step(problem, method.init(problem))
    assert state.drafted
    assert problem.best is None
    assert method.best(problem, state) == state.best[0]
    state, info = method.step(problem, state)
    assert method.finished(state)
    assert method.best(problem, state) is problem.best
    assert info.values == {"draft": state.best[0].score, "score": problem.best.score}


def test_a_found_noise_is_run_in_full(plane):
    problem, plain = plane(**ODE), plane(**ODE)
    solve(problem, DraftCommit(ZeroOrder(rounds=6, patience=None), steps=5, commits=1))
    lineage = problem.best.lineage
    assert lineage.noise is not None
    start = plain.start([lineage.moves[0].seed], lineage.noise[None])
    image = plain.finish(plain.run(start), [None])[0].image
    assert torch.equal(problem.best.image, image)


@pytest.mark.parametrize("inner", [BestOfN(), BestOfN(batch=1), ZeroOrder()])
@pytest.mark.parametrize("nfe", [24, 33, 47, 101])
def test_budgets_leave_the_share_of_the_full_images(plane, inner, nfe):
    problem = plane(nfe=nfe, **ODE)
    state, _ = solve(problem, DraftCommit(inner, steps=4, commits=2))
    # both are run in full, or the one that the smallest budget lets be drafted
    assert state.full == (1 if nfe == 24 else 2)
    assert problem.meter.rows <= nfe
    assert nfe == 24 or nfe - problem.meter.rows < 4


def test_the_final_call_is_kept_back_too(plane):
    problem = plane(nfe=60, reserve=1, **ODE)
    solve(problem, DraftCommit(BestOfN(batch=1), steps=4, commits=1))
    # 50 are left; the full image's 10 are kept as 3 drafts of 4
    assert problem.meter.rows == 9 * 4 + 10


def test_budgets_of_scores_are_kept(plane):
    problem = plane(rewards=9, **ODE)
    state, _ = solve(problem, DraftCommit(BestOfN(), steps=4, commits=2))
    assert (problem.meter.rewards, state.full) == (9, 2)


@pytest.mark.slow
def test_most_of_the_gain_for_less(plane):
    """Mean over 40 seeds: with drafts of half the steps the best of 12 keeps over half of the gain
    of best-of-12, for 80 instead of 120 evaluations."""
    gains = {"plain": 0.0, "drafts": 0.0}
    for seed in range(40):
        plain, drafts = plane(seed=seed, **ODE), plane(seed=seed, **ODE)
        solve(plain, BestOfN(12, batch=12))
        solve(drafts, DraftCommit(BestOfN(12), steps=5, commits=2))
        first = plane(seed=seed, **ODE)
        start = first.finish(first.run(first.start(first.seeds(1))), [None])[0].score
        gains["plain"] += plain.best.score - start
        gains["drafts"] += drafts.best.score - start
    assert 0.5 < gains["drafts"] / gains["plain"] <= 1.0 + 1e-9


@pytest.mark.parametrize("inner", [Beam(), PathSearch(), "beam:preset=svdd"])
def test_a_method_that_branches_inside_is_refused(inner):
    with pytest.raises(ValueError, match="makes choices inside a trajectory"):
        DraftCommit(inner)


def test_fewer_steps_of_a_random_sampler_are_refused(plane):
    assert "says nothing about the full one" in DraftCommit(steps=4).refuses(plane(eta=1.0))
    assert DraftCommit(steps=4).refuses(plane(**ODE)) is None
    # the inner method's own reason counts too
    problem = plane(eta=1.0)
    assert "neighbouring" in DraftCommit(ZeroOrder(), steps=10).refuses(problem)


def test_a_dearer_draft_is_refused(plane):
    assert "more than a full image" in DraftCommit(steps=20).refuses(plane(**ODE))


@pytest.mark.parametrize(
    "text",
    [
        "draft-commit",
        "draft-commit:steps=8",
        'draft-commit:inner="zero-order:neighbours=2,rounds=3",commits=1',
        "draft-commit:techniques=(adaptive-guidance),cache=0.1",
    ],
)
def test_text_and_configuration_there_and_back(text):
    (method,) = METHODS.make(text)
    assert written(METHODS, method) == text
    assert METHODS.from_config(METHODS.to_config(method)) == method


def test_objects_become_text():
    from diffalign.guidance import CFG, AdaptiveGuidance

    method = DraftCommit(
        ZeroOrder(neighbours=2), techniques=(AdaptiveGuidance(threshold=0.9), CFG(2.0))
    )
    assert method.inner == "zero-order:neighbours=2"
    assert method.techniques == ("adaptive-guidance:threshold=0.9", "cfg:scale=2")
    assert method.cheaper == (AdaptiveGuidance(threshold=0.9), CFG(2.0))
    again = METHODS.from_config(METHODS.to_config(method))
    assert again.cheaper == method.cheaper
    assert again.method == ZeroOrder(neighbours=2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"inner": "best-of"}, "Nearest: best-of-n"),
        ({"inner": "best-of-n:m=3"}, "no option 'm'"),
        ({"techniques": ("adaptive",)}, "adaptive-guidance"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        DraftCommit(**options)


def test_it_ends_as_its_inner_method_does():
    assert DraftCommit(BestOfN(3)).ends
    assert not DraftCommit().ends


def test_an_inner_method_of_gradients_needs_one(plane):
    problem = plane(**ODE)
    problem.reward = lambda images, prompts: images.mean((1, 2, 3))
    with pytest.raises(ValueError, match="inner='reno' needs a reward with gradient"):
        solve(problem, DraftCommit(inner="reno"))


def test_nothing_fits(plane):
    problem = plane(nfe=9, **ODE)
    infos = solve(problem, DraftCommit(BestOfN(), steps=4))[1]
    assert (infos, problem.meter.rows) == ([], 0)
