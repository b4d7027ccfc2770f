"""The loop's guards: numbers that are not finite, gradients that do not arrive, scores that stall,
memory that ends."""

import pytest
import torch

from diffalign.core import errors
from diffalign.noise_opt import CARINOX, FIND, RandomSearch, ReNO
from diffalign.noise_opt.norm import chi_gradient
from diffalign.testing.search import solve


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Warnings are given once in a process; here each test hears its own."""
    monkeypatch.setattr(errors, "_WARNED", set())


class Breaking:
    """Scores, and gradients, that are not finite from call ``begin`` on, ``count`` times."""

    def __init__(self, begin, count, what="score"):
        self.begin, self.end, self.what, self.calls = begin, begin + count, what, 0

    def __call__(self, points):
        self.calls += 1
        scores = points.sum(1)
        if not self.begin <= self.calls < self.end:
            return scores
        if self.what == "score":
            return scores * float("nan")
        return scores + 0 * (scores - scores.detach()).sqrt()


@pytest.mark.parametrize("what", ["score", "gradient"])
def test_one_bad_number_halves_the_rate_and_goes_back(plain, what):
    problem = plain(Breaking(3, 1, what))
    method = ReNO(iterations=6, rate=1.0, clip=None, regulariser=0.0)
    state, point, rates = method.init(problem), None, []
    for _ in range(7):
        before = state
        state, info = method.step(problem, state)
        rates.append(state.rate)
        if info.text.startswith("a gradient"):
            assert info.values["failures"] == 1
            assert torch.equal(state.point, before.last)
            point = state.point
    assert point is not None
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert method.finished(state)


@pytest.mark.parametrize("what", ["score", "gradient"])
def test_three_bad_numbers_end_a_start_with_the_best(plain, what):
    problem = plain(Breaking(3, 99, what))
    with pytest.warns(UserWarning, match="not finite 3 times"):
        _, infos = solve(problem, ReNO(iterations=9))
    assert infos[-1].values["failures"] == 3
    assert problem.best.score == max(info.values.get("score", -9e9) for info in infos)


def test_the_next_start_begins_anew(plain):
    problem = plain([(1.0, Breaking(2, 3))])
    with pytest.warns(UserWarning, match="not finite"):
        state, infos = solve(problem, CARINOX(starts=2, iterations=4, rate=0.1))
    assert state.ended
    assert infos[-1].text == "start 2 of 2, iteration 4 of 4"
    assert state.failures == 0


def test_without_any_score_there_is_nothing_to_keep(plain):
    with pytest.raises(ValueError, match="first image is not a finite number"):
        solve(plain(Breaking(1, 99)), ReNO())


@pytest.mark.parametrize(("factor", "word"), [(1e-5, "vanishes"), (1e5, "explodes")])
def test_a_gradient_that_does_not_arrive_is_refused(plain, factor, word):
    problem = plain(lambda points: points.sum(1))
    problem.sampler.model = type(
        "Scaled", (), {"size": 16, "clean": staticmethod(lambda x, alpha, s: factor * x)}
    )()
    with pytest.raises(ValueError, match=f"{word} over 1 evaluations: in the noise it is"):
        solve(problem, ReNO(iterations=3))
    assert problem.best is not None
    solve(problem, ReNO(iterations=3, force=True))


class Steep:
    """A model whose image moves far too much with the noise in the evaluations of these numbers."""

    size = 16

    def __init__(self, *numbers):
        self.numbers, self.count = numbers, 0

    def clean(self, x, alpha, s):
        self.count += 1
        return (1e5 if self.count in self.numbers else 1.0) * x


@pytest.mark.parametrize(("steep", "lost"), [((1,), 1), ((5,), 1), ((1, 2), 2)])
def test_a_start_whose_gradient_is_lost_gives_way_to_the_next(plain, steep, lost):
    problem = plain([(1.0, lambda points: points.sum(1))])
    problem.sampler.model = Steep(*steep)
    with pytest.warns(UserWarning, match="explodes over 1 evaluations.*This start ends"):
        state, infos = solve(problem, CARINOX(starts=3, iterations=4, rate=0.1))
    assert state.ended
    assert state.lost == lost
    assert [info.values["lost"] for info in infos if "lost" in info.values] == [*range(1, lost + 1)]
    assert problem.meter.rows == lost + 4 * (3 - lost)


def test_a_gradient_that_is_lost_from_every_start_is_refused(plain):
    problem = plain([(1.0, lambda points: points.sum(1))])
    problem.sampler.model = Steep(1, 2)
    with (
        pytest.warns(UserWarning, match="This start ends"),
        pytest.raises(ValueError, match="expl"),
    ):
        solve(problem, CARINOX(starts=2, iterations=4))
    assert problem.meter.rows == 2


def test_a_flat_reward_is_no_vanished_gradient(plain):
    problem = plain(lambda points: 0 * points.sum(1))
    solve(problem, ReNO(iterations=3))
    assert problem.meter.rows == 3


def test_many_evaluations_are_advised_against(plane):
    with pytest.warns(UserWarning, match="through 12 evaluations may vanish"):
        assert ReNO().refuses(plane(lambda points: points.sum(1), steps=12)) is None
    assert ReNO(gradient="skip").refuses(plane(lambda points: points.sum(1), steps=12)) is None


def test_a_score_that_stands_still_is_reported(plain):
    problem = plain(lambda points: 100 + 1e-3 * points.sum(1))
    with pytest.warns(UserWarning, match="after 10 iterations the score has changed by less"):
        solve(problem, ReNO(iterations=12, regulariser=0.0))


@pytest.mark.parametrize("method", [ReNO(), CARINOX(), FIND(), RandomSearch()])
def test_a_budget_is_kept(plain, method):
    problem = plain([(1.0, lambda points: points.sum(1))], nfe=23)
    solve(problem, method)
    assert 20 <= problem.meter.rows <= 23
    assert problem.best is not None


def test_the_norm_stays_on_the_shell_with_the_regulariser_and_leaves_without(plain):
    """Mode sqrt(d - 1), deviation 1 / sqrt(2); a reward that pushes outwards. Four deviations."""
    far = {}
    for weight in (0.0, 1.0):
        problem = plain(lambda points: 0.01 * points.square().sum(1), size=256)
        method = ReNO(iterations=40, regulariser=weight, clip=None)
        _, infos = solve(problem, method)
        norms = [info.values["norm"] for info in infos]
        far[weight] = max(abs(norm - 255**0.5) * 2**0.5 for norm in norms)
    assert far[1.0] <= 4.0 < far[0.0]


def test_the_pull_of_dno_moves_noise_towards_normal(plain):
    """A constant added to normal noise: DNO's term points against it, the norm's hardly does."""
    noise = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    state = ReNO().begin(plain(lambda points: points.sum(1), size=256), ReNO().init(None))
    pull = ReNO(regulariser=0.0, normality=1.0).pull(state, noise)
    assert float(pull.mean()) < 0
    both = ReNO(regulariser=1.0, normality=1.0).pull(state, noise)
    torch.testing.assert_close(both, pull + chi_gradient(noise))
